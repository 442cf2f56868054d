"""The demo: one detector, trained by each kind of steps, and what each costs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from man_mm.datasets.make_digits import make_digits
from man_mm.engine.config_files import find_config, load_config

from .comparison import read_results, run_all
from .comparison_picture import draw_comparison
from .demo_pictures import draw_detections
from .records import MIB
from .scheme_costs import measure_configs
from .schemes import END_TO_END, EXACT, JOINT, JOINT_WEIGHT, LOCAL
from .step_picture import draw
from .step_recording import record_steps
from .training_runs import ComparedConfig, Run

PLAIN = 'configs/end_to_end/retinanet_r34_demo.py'
CONFIG = 'configs/man/retinanet_r34_man_demo.py'
WORK_DIR = Path('work_dirs/demo')
SIZE = 96  # pixels, of the images of make_digits
REPEATS = 7
DIAL = 0.5  # of the mixed training, after which local steps give way to joint ones
_MAP, _AP50 = 'coco/bbox_mAP', 'coco/bbox_mAP_50'


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        name: How it is called.
        schemes: The schemes of its steps, as `benchmark` calls them; of several, each
            takes the same share of the training.
        trained: Name of the training that shows its accuracy.
    """

    name: str
    schemes: tuple[str, ...]
    trained: str


def rows() -> list[Row]:
    """What is compared: end-to-end training first, then against it."""
    cuts = ','.join(load_config(CONFIG).optim_wrapper.local_learning.partition.cuts)
    checkpointed = f'{END_TO_END}+lean+in-backward+cuts={cuts}'
    mixed = f'{LOCAL}, then {JOINT}'
    return [
        Row('end to end', (END_TO_END,), END_TO_END),
        Row('end to end, checkpointed', (checkpointed,), END_TO_END),
        Row(JOINT, (JOINT,), JOINT),
        Row(LOCAL, (LOCAL,), LOCAL),
        Row(mixed, (LOCAL, JOINT), mixed),
    ]


def trainings() -> list[ComparedConfig]:
    """What is trained."""
    place = 'optim_wrapper.local_learning'
    weight = f'{place}.local_loss_weight={JOINT_WEIGHT}'
    dial = f'{place}.end_to_end_from'
    return [
        ComparedConfig(END_TO_END, PLAIN),
        ComparedConfig(JOINT, CONFIG, (f'{dial}=0.0', weight)),
        ComparedConfig(LOCAL, CONFIG),
        ComparedConfig(f'{LOCAL}, then {JOINT}', CONFIG, (f'{dial}={DIAL}', weight)),
    ]


def run_demo(seed: int, console: Console) -> list[Path]:
    """Makes the data set, measures a step of each scheme, trains, and tells.

    Args:
        seed: Of the trainings.
        console: Where progress, the table and what it means are shown.

    Returns:
        The pictures.

    Raises:
        RuntimeError: If a training fails.
    """
    console.rule('1 of 4: images')
    make_digits('data/digits', size=SIZE)

    console.rule('2 of 4: memory and time of a step, all schemes in turn')
    compared, size = rows(), (SIZE, SIZE)
    batch = load_config(CONFIG).train_dataloader.batch_size
    schemes = list(dict.fromkeys(x for row in compared for x in row.schemes))
    records = measure_configs(
        [CONFIG], size, [batch], REPEATS, schemes, out=WORK_DIR, console=console
    )
    recorded = record_steps(
        CONFIG, size, batch, schemes=(END_TO_END, EXACT, JOINT, LOCAL)
    )
    pictures = [WORK_DIR / f'{name}.png' for name in ('step', 'training', 'detections')]
    draw(recorded, pictures[0])

    console.rule('3 of 4: training, two at a time')
    runs = [
        Run(entry, seed, WORK_DIR / 'results', WORK_DIR, position)
        for position, entry in enumerate(trainings())
    ]
    run_all(runs, min(2, len(os.sched_getaffinity(0))), console)
    results = read_results(run.path for run in runs)

    console.rule('4 of 4: results')
    draw_comparison(results, pictures[1])
    last = runs[-1].work_dir / 'last_checkpoint'
    checkpoint, name = Path(last.read_text().strip()), runs[-1].entry.name
    draw_detections(find_config(PLAIN), checkpoint, name, pictures[2])
    costs = summarise(compared, records, results)
    console.print(make_table(costs, f'{Path(CONFIG).stem}, seed {seed}'))
    console.print('\n'.join(conclusions(costs)), highlight=False)
    return pictures


def summarise(
    compared: Sequence[Row], records: Sequence[dict], results: Sequence[dict]
) -> list[dict]:
    """Costs and accuracy of each row.

    Args:
        compared: The rows.
        records: Those of `measure_configs`, of all their schemes.
        results: Those of the trainings.

    Returns:
        For each row its ``name``, ``mAP`` and ``AP50``; ``peak`` in bytes, the largest
        of its steps; ``seconds`` of a step, the mean of its schemes, or None if they
        were not timed; their ratios to the first row, and ``flops_ratio``; and
        ``exactness``, as `benchmark` measures it.
    """
    by_scheme = {record['scheme']: record for record in records}
    metrics = {result['name']: result['metrics'] for result in results}
    costs = []
    for row in compared:
        steps = [by_scheme[scheme] for scheme in row.schemes]
        seconds = time_ratio = None
        if all(step['seconds'] for step in steps):
            seconds = statistics.mean(
                statistics.median(step['seconds']) for step in steps
            )
            time_ratio = statistics.mean(step['time_ratio'] for step in steps)
        costs.append(
            dict(
                name=row.name,
                mAP=metrics[row.trained][_MAP],
                AP50=metrics[row.trained][_AP50],
                peak=max(step['peak'] for step in steps),
                peak_ratio=max(step['peak_ratio'] for step in steps),
                seconds=seconds,
                time_ratio=time_ratio,
                flops_ratio=statistics.mean(step['flops_ratio'] for step in steps),
                exactness=steps[0]['exactness'],
            )
        )
    return costs


def make_table(costs: Sequence[dict], title: str) -> Table:
    """The rows of `summarise`, as a table."""
    table = Table(title=title)
    table.add_column('training')
    for column in ('mAP', 'AP50', 'peak MiB', 'ratio', 'step s', 'ratio', 'FLOPs'):
        table.add_column(column, justify='right')
    for row in costs:
        timed = row['seconds'] is not None
        table.add_row(
            row['name'],
            f'{row["mAP"]:.3f}',
            f'{row["AP50"]:.3f}',
            f'{row["peak"] / MIB:.1f}',
            f'{row["peak_ratio"]:.2f}',
            f'{row["seconds"]:.2f}' if timed else '–',
            f'{row["time_ratio"]:.2f}' if timed else '–',
            f'{row["flops_ratio"]:.2f}',
        )
    return table


def conclusions(costs: Sequence[dict]) -> list[str]:
    """What the numbers of `summarise` mean, in sentences."""
    plain, checkpointed, *others = costs
    lines = [
        f'End to end, a step needs {plain["peak"] / MIB:.0f} MiB beside weights and '
        f'optimizer, and the training reaches {plain["mAP"]:.3f} mAP.',
        f'Checkpointing trains the same weights (after a step they were off by '
        f'{checkpointed["exactness"]:.0g} of it), so it shares that mAP: '
        f'{_cost(checkpointed)}.',
    ]
    for row in others:
        gain = f'{row["mAP"] - plain["mAP"]:+.3f} mAP'
        lines.append(f'{row["name"].capitalize()}: {gain}, {_cost(row)}.')
    lines.append(
        'Exact and joint steps run every module twice, for the gradient of end-to-end '
        'training; local steps run it once, each with a loss of its own. '
        'end_to_end_from sets where in a training local steps give way to joint ones. '
        'This is one seed and a few minutes of training: a point or two of mAP more or '
        'less are chance.'
    )
    return lines


def _cost(row: dict) -> str:
    text = f'{row["peak_ratio"]:.0%} of the memory'
    if row['seconds'] is not None:
        text += f', {row["time_ratio"]:.0%} of the time'
    return text
