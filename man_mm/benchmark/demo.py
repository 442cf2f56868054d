"""Train a detector by local learning on built-in images, beside end-to-end training.

    mim run man_mm demo [--seed 0]

Makes the digits data set, trains the same RetinaNet end to end and by MAN with the
stock ``mim train mmdet``, and ends with a table, a picture of detections and a plot of
the module losses in ``work_dirs/demo``. Takes some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from man_mm.datasets.make_digits import make_digits
from man_mm.version import __version__

from .scheme_costs import MIB, load_config, measure

matplotlib.use('Agg')
import matplotlib.pyplot as plt

CONFIGS = {
    'end-to-end': 'configs/end_to_end/retinanet_r18_demo.py',
    'local learning': 'configs/man/retinanet_r18_man_demo.py',
}
SCHEMES = {'end-to-end': 'end-to-end', 'local learning': 'local'}
WORK_DIR = Path('work_dirs/demo')
SHOWN = re.compile(r'Iter\((train|val)\).*|\w+Error: .*')
SCENES = 8
SIZE = 96  # pixels, of the images of make_digits

console = Console()


def train(name: str, seed: int) -> tuple[Path, float]:
    """Trains a config by ``mim train mmdet``; the full log goes to its work dir.

    Returns:
        The work dir, and the seconds that it took, evaluation included.
    """
    work_dir = WORK_DIR / name.replace(' ', '_')
    mim = Path(sys.executable).with_name('mim')
    command = [
        mim,
        'train',
        'mmdet',
        CONFIGS[name],
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
        sys.exit(''.join(lines[-30:]) + f'\n{name}: training failed, see {work_dir}.')
    return work_dir, time.perf_counter() - start


def latest_scalars(work_dir: Path) -> list[dict]:
    """Rows of the newest run's scalar log in a work dir."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_losses(work_dir: Path, out: Path) -> None:
    """Plots the loss of every module against the iteration."""
    rows = [row for row in latest_scalars(work_dir) if 'loss' in row]
    local = sorted(key for key in rows[0] if re.fullmatch(r'module\d+/loss', key))
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for key in local:
        axes.plot(
            [row['step'] for row in rows],
            [row[key] for row in rows],
            label=f'{key.split("/")[0]} (auxiliary head)',
        )
    axes.plot(
        [row['step'] for row in rows],
        [row['loss'] for row in rows],
        'k--',
        label=f"module{len(local) + 1} (the model's own loss)",
    )
    axes.set(xlabel='iteration', ylabel='loss', ylim=(0, None))
    axes.set_title('Every module learns from its own loss')
    axes.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_detections(checkpoint: Path, out: Path) -> None:
    """Draws validation images with true boxes and detections, one above the other.

    The checkpoint is loaded strictly into the stock config: local learning leaves
    nothing behind in the model.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmengine.runner import load_checkpoint
    from pycocotools.coco import COCO

    model = init_detector(CONFIGS['end-to-end'], device='cpu')
    load_checkpoint(model, str(checkpoint), strict=True)
    root = Path('data/digits')
    coco = COCO(str(root / 'annotations/instances_val.json'))
    figure, axes = plt.subplots(
        2, SCENES, figsize=(2 * SCENES, 4.4), layout='constrained'
    )
    for column, image in enumerate(coco.loadImgs(sorted(coco.imgs)[:SCENES])):
        path = root / 'val' / image['file_name']
        truth = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        found = inference_detector(model, str(path)).pred_instances
        found = found[found.scores > 0.4]
        boxes = [(*a['bbox'], str(a['category_id'] - 1)) for a in truth]
        _draw(axes[0, column], plt.imread(path), boxes, 'lime')
        xywh = found.bboxes.clone()
        xywh[:, 2:] -= xywh[:, :2]
        labels = [str(label) for label in found.labels.tolist()]
        boxes = [
            (*box, label) for box, label in zip(xywh.tolist(), labels, strict=True)
        ]
        _draw(axes[1, column], plt.imread(path), boxes, 'orange')
    axes[0, 0].set_ylabel('truth')
    axes[1, 0].set_ylabel('MAN')
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw(axes, image, boxes: list[tuple], colour: str) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for x, y, width, height, label in boxes:
        axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, ec=colour))
        axes.text(x, y - 1, label, color=colour, fontsize=9, weight='bold')


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seed', type=int, default=0, help='of the training runs')
    parser.add_argument('--out', type=Path, default=WORK_DIR / 'result.json')
    args = parser.parse_args()
    seed = args.seed

    console.rule('data set')
    make_digits('data/digits', size=SIZE)
    runs = {name: train(name, seed) for name in CONFIGS}

    console.rule('memory and time of a step, both schemes in turn')
    cfg = load_config(CONFIGS['local learning'])
    batch = cfg.train_dataloader.batch_size
    steps = measure(cfg, (SIZE, SIZE), batch, repeats=7, schemes=list(SCHEMES.values()))

    table = Table(
        title=f'RetinaNet-R18 on digits, {batch} x {SIZE}x{SIZE}, seed {seed}'
    )
    for column in ('', 'mAP', 'AP50', 'peak MiB', 'step s', 'run s'):
        table.add_column(column, justify='right' if column else 'left')
    record = dict(
        seed=seed,
        threads=torch.get_num_threads(),
        versions=dict(man_mm=__version__, torch=torch.__version__),
        command=f'mim run man_mm demo --seed {seed}',
        results={},
    )
    for name, (work_dir, seconds) in runs.items():
        scores = [r for r in latest_scalars(work_dir) if 'coco/bbox_mAP' in r][-1]
        row = record['results'][name] = dict(
            mAP=scores['coco/bbox_mAP'],
            AP50=scores['coco/bbox_mAP_50'],
            peak_bytes=steps[SCHEMES[name]]['peak'],
            step_seconds=statistics.median(steps[SCHEMES[name]]['seconds']),
            run_seconds=round(seconds, 1),
        )
        table.add_row(
            name,
            f'{row["mAP"]:.3f}',
            f'{row["AP50"]:.3f}',
            f'{row["peak_bytes"] / MIB:.1f}',
            f'{row["step_seconds"]:.3f}',
            f'{seconds:.0f}',
        )
    man_dir = runs['local learning'][0]
    plot_losses(man_dir, WORK_DIR / 'losses.png')
    checkpoint = Path((man_dir / 'last_checkpoint').read_text().strip())
    draw_detections(checkpoint, WORK_DIR / 'detections.png')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + '\n')
    console.print(table)
    for path in (WORK_DIR / 'losses.png', WORK_DIR / 'detections.png', args.out):
        console.print(path)
