"""Pictures of the demo: losses of the modules, and detections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

SCENES = 8


def plot_losses(scalars: Sequence[dict], out: Path) -> None:
    """Plots the loss of every module against the iteration.

    Args:
        scalars: Rows of the scalar log.
        out: PNG file.
    """
    rows = [row for row in scalars if 'loss' in row]
    local = sorted(key for key in rows[0] if re.fullmatch(r'module\d+/loss', key))
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
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


def draw_detections(config: Path, checkpoint: Path, out: Path) -> None:
    """Draws validation images with true boxes and detections, one above the other.

    The checkpoint is loaded strictly into the stock config: local learning leaves
    nothing behind in the model.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmengine.runner import load_checkpoint
    from pycocotools.coco import COCO

    model = init_detector(config, device='cpu')
    load_checkpoint(model, str(checkpoint), strict=True)
    root = Path('data/digits')
    coco = COCO(str(root / 'annotations/instances_val.json'))
    figure = Figure(figsize=(2 * SCENES, 4.4), layout='constrained')
    axes = figure.subplots(2, SCENES)
    for column, image in enumerate(coco.loadImgs(sorted(coco.imgs)[:SCENES])):
        path = root / 'val' / image['file_name']
        truth = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        found = inference_detector(model, str(path)).pred_instances
        found = found[found.scores > 0.4]
        boxes = [(*a['bbox'], str(a['category_id'] - 1)) for a in truth]
        _draw(axes[0, column], imread(path), boxes, 'lime')
        xywh = found.bboxes.clone()
        xywh[:, 2:] -= xywh[:, :2]
        labels = [str(label) for label in found.labels.tolist()]
        boxes = [
            (*box, label) for box, label in zip(xywh.tolist(), labels, strict=True)
        ]
        _draw(axes[1, column], imread(path), boxes, 'orange')
    axes[0, 0].set_ylabel('truth')
    axes[1, 0].set_ylabel('MAN')
    figure.savefig(out, dpi=110)


def _draw(axes, image, boxes: list[tuple], colour: str) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    for x, y, width, height, label in boxes:
        axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour))
        axes.text(x, y - 1, label, color=colour, fontsize=9, weight='bold')
