"""The demo: a detector trained by local learning, beside end-to-end training."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from man_mm.datasets.make_digits import make_digits
from man_mm.engine.config_files import find_config, load_config
from man_mm.stack import find_distributions
from man_mm.version import __version__

from .demo_pictures import draw_detections, plot_losses
from .records import MIB
from .scheme_costs import measure_schemes

CONFIGS = {
    'end-to-end': 'configs/end_to_end/retinanet_r18_demo.py',
    'local learning': 'configs/man/retinanet_r18_man_demo.py',
}
SCHEMES = {'end-to-end': 'end-to-end', 'local learning': 'local'}
WORK_DIR = Path('work_dirs/demo')
SHOWN = re.compile(r'Iter\((train|val)\).*|\w+Error: .*')
SIZE = 96  # pixels, of the images of make_digits

console = Console()


def train(name: str, seed: int) -> tuple[Path, float]:
    """Trains a config by ``mim train mmdet``; the full log goes to its work dir.

    Returns:
        The work dir, and the seconds that it took, evaluation included.

    Raises:
        RuntimeError: If the training fails; the message ends with its log.
    """
    work_dir = WORK_DIR / name.replace(' ', '_')
    mim = Path(sys.executable).with_name('mim')
    command = [
        mim,
        'train',
        # Of the forks, mim knows the distribution: onedl-mmdetection.
        next(iter(find_distributions('mmdet')), 'mmdet'),
        find_config(CONFIGS[name]),
        '--gpus',
        '0',
        '--launcher',
        'none',
    ]
    command += ['--work-dir', work_dir, '--cfg-options', f'randomness.seed={seed}']
    console.rule(f'{name}: mim train mmdet {CONFIGS[name]}')
    start = time.perf_counter()
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if shown := SHOWN.search(line):
                print(shown.group(), flush=True)
    if process.returncode:
        tail = ''.join(lines[-30:])
        raise RuntimeError(f'{tail}\n{name}: training failed, see {work_dir}.')
    return work_dir, time.perf_counter() - start


def latest_scalars(work_dir: Path) -> list[dict]:
    """Rows of the newest run's scalar log in a work dir."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_demo(seed: int) -> tuple[dict, list[Path]]:
    """Makes the data set, trains both ways, measures a step of both, and draws.

    Args:
        seed: Of the training runs.

    Returns:
        The record, and the pictures.

    Raises:
        RuntimeError: If a training fails.
    """
    console.rule('data set')
    make_digits('data/digits', size=SIZE)
    runs = {name: train(name, seed) for name in CONFIGS}

    console.rule('memory and time of a step, both schemes in turn')
    cfg = load_config(CONFIGS['local learning'])
    batch = cfg.train_dataloader.batch_size
    steps = measure_schemes(
        cfg, (SIZE, SIZE), batch, repeats=7, schemes=list(SCHEMES.values())
    )

    record = dict(
        seed=seed,
        threads=torch.get_num_threads(),
        versions=dict(man_mm=__version__, torch=torch.__version__),
        command=f'mim run man_mm demo --seed {seed}',
        results={},
    )
    for name, (work_dir, seconds) in runs.items():
        scores = [r for r in latest_scalars(work_dir) if 'coco/bbox_mAP' in r][-1]
        record['results'][name] = dict(
            mAP=scores['coco/bbox_mAP'],
            AP50=scores['coco/bbox_mAP_50'],
            peak_bytes=steps[SCHEMES[name]]['peak'],
            step_seconds=statistics.median(steps[SCHEMES[name]]['seconds']),
            run_seconds=round(seconds, 1),
        )
    man_dir = runs['local learning'][0]
    checkpoint = Path((man_dir / 'last_checkpoint').read_text().strip())
    losses, detections = WORK_DIR / 'losses.png', WORK_DIR / 'detections.png'
    plot_losses(latest_scalars(man_dir), losses)
    draw_detections(find_config(CONFIGS['end-to-end']), checkpoint, detections)
    return record, [losses, detections]


def make_table(record: dict) -> Table:
    """A row of each scheme: accuracy, memory and time."""
    table = Table(
        title=f'RetinaNet-R18 on digits of {SIZE}x{SIZE}, seed {record["seed"]}'
    )
    for column in ('', 'mAP', 'AP50', 'peak MiB', 'step s', 'run s'):
        table.add_column(column, justify='right' if column else 'left')
    for name, row in record['results'].items():
        table.add_row(
            name,
            f'{row["mAP"]:.3f}',
            f'{row["AP50"]:.3f}',
            f'{row["peak_bytes"] / MIB:.1f}',
            f'{row["step_seconds"]:.3f}',
            f'{row["run_seconds"]:.0f}',
        )
    return table
