"""The demo: a detector trained end to end, by joint steps and by local learning."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from man_mm.datasets.make_digits import make_digits
from man_mm.engine.config_files import find_config, load_config
from man_mm.version import __version__

from .demo_pictures import draw_detections, plot_losses
from .demo_training import latest_scalars, train_all
from .records import MIB
from .scheme_costs import measure_schemes
from .schemes import JOINT_WEIGHT
from .step_picture import draw
from .step_recording import record_steps

PLAIN = 'configs/end_to_end/retinanet_r18_demo.py'
MAN = 'configs/man/retinanet_r18_man_demo.py'
WORK_DIR = Path('work_dirs/demo')
SIZE = 96  # pixels, of the images of make_digits
_NOISE = 0.02  # mAP: what another seed can change

console = Console()


@dataclass(frozen=True)
class Way:
    """A way to train the network.

    Attributes:
        schemes: Whose steps it consists of, in equal shares.
        config: What is trained; None where it would be end-to-end training bit by bit.
        end_to_end_from: Share of the training after which steps are joint ones; None
            never.
    """

    schemes: tuple[str, ...]
    config: str | None
    end_to_end_from: float | None = None

    def arguments(self, seed: int) -> list[str]:
        """Config and options of its training."""
        options = [f'randomness.seed={seed}']
        if self.end_to_end_from is not None:
            local = 'optim_wrapper.local_learning'
            options += [
                f'{local}.end_to_end_from={self.end_to_end_from}',
                f'{local}.local_loss_weight={JOINT_WEIGHT}',
            ]
        return [self.config, *options]


WAYS = {
    'end-to-end': Way(('end-to-end',), PLAIN),
    'exact checkpointing': Way(('end-to-end+lean+stages',), None),
    'joint': Way(('joint',), MAN, 0.0),
    'local learning': Way(('local',), MAN),
    'local, then joint': Way(('local', 'joint'), MAN, 0.5),
}


def run_demo(seed: int) -> tuple[dict, list[Path]]:
    """Makes the data set, trains in each way, measures a step of each, and draws.

    Args:
        seed: Of the training runs.

    Returns:
        The record, and the pictures.

    Raises:
        RuntimeError: If a training fails.
    """
    console.rule('1 of 3: data set')
    make_digits('data/digits', size=SIZE)
    console.rule('2 of 3: trainings, two at a time, by mim train mmdet')
    trained = {name: way for name, way in WAYS.items() if way.config}
    runs = train_all(
        {name: way.arguments(seed) for name, way in trained.items()}, WORK_DIR, console
    )
    console.rule('3 of 3: memory and time of a step, all in turn')
    cfg = load_config(MAN)
    batch = cfg.train_dataloader.batch_size
    schemes = list(dict.fromkeys(x for way in WAYS.values() for x in way.schemes))
    costs = measure_schemes(cfg, (SIZE, SIZE), batch, repeats=7, schemes=schemes)
    record = dict(
        seed=seed,
        threads=torch.get_num_threads(),
        versions=dict(man_mm=__version__, torch=torch.__version__),
        command=f'mim run man_mm demo --seed {seed}',
        results={name: _costs_of(way, costs) for name, way in WAYS.items()},
    )
    for name, work_dir in runs.items():
        scores = [r for r in latest_scalars(work_dir) if 'coco/bbox_mAP' in r][-1]
        record['results'][name].update(
            mAP=scores['coco/bbox_mAP'], AP50=scores['coco/bbox_mAP_50']
        )
    return record, _draw(runs['local learning'], batch)


def make_table(record: dict) -> Table:
    """A row of each way to train: accuracy, memory and time."""
    table = Table(
        title=f'RetinaNet-R18 on digits of {SIZE}x{SIZE}, seed {record["seed"]}'
    )
    for column in ('', 'mAP', 'AP50', 'peak MiB', 'ratio', 'step s', 'ratio'):
        table.add_column(column, justify='right' if column else 'left')
    rows = record['results']
    base = rows['end-to-end']
    for name, row in rows.items():
        table.add_row(
            name,
            # Bit by bit as end to end, so not trained again.
            *(f'{row.get(key, base[key]):.3f}' for key in ('mAP', 'AP50')),
            f'{row["peak_bytes"] / MIB:.1f}',
            f'{row["peak_bytes"] / base["peak_bytes"]:.2f}',
            f'{row["step_seconds"]:.3f}',
            f'{row["step_seconds"] / base["step_seconds"]:.2f}',
        )
    return table


def explain(record: dict) -> str:
    """What the numbers mean, in sentences."""
    rows = record['results']
    base = rows['end-to-end']
    parts = []
    for name in ('exact checkpointing', 'joint', 'local learning'):
        row = rows[name]
        memory = row['peak_bytes'] / base['peak_bytes']
        seconds = row['step_seconds'] / base['step_seconds']
        parts.append(f'{name} {memory:.0%} of the memory in {seconds:.0%} of the time')
    gains = {
        name: row['mAP'] - base['mAP'] for name, row in rows.items() if 'mAP' in row
    }
    best = max(gains, key=gains.get)
    told = ', '.join(
        f'{name} {gain:+.3f}' for name, gain in gains.items() if name != 'end-to-end'
    )
    return (
        f'Of what end-to-end training needs, {parts[0]}, {parts[1]}, and {parts[2]}. '
        f'mAP beside it: {told}; {best} is best. Another seed changes mAP by up to '
        f'{_NOISE}, and this is the beginning of a training. The larger the network, '
        'the more memory local learning saves, in the time of plain training: see '
        'docs/memory.md.'
    )


def _costs_of(way: Way, costs: dict[str, dict]) -> dict:
    steps = [costs[scheme] for scheme in way.schemes]
    return dict(
        peak_bytes=max(step['peak'] for step in steps),
        step_seconds=statistics.mean(statistics.median(x['seconds']) for x in steps),
    )


def _draw(man_dir: Path, batch: int) -> list[Path]:
    checkpoint = Path((man_dir / 'last_checkpoint').read_text().strip())
    memory, losses, detections = (
        WORK_DIR / f'{name}.png' for name in ('memory', 'losses', 'detections')
    )
    schemes = ('end-to-end', 'joint', 'local')
    steps = record_steps(MAN, (SIZE, SIZE), batch, schemes=schemes)
    draw(steps, memory)
    plot_losses(latest_scalars(man_dir), losses)
    draw_detections(find_config(PLAIN), checkpoint, detections)
    return [memory, losses, detections]
