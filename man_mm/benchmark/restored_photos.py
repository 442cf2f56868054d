"""What super-resolution models return, side by side with their PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from PIL import Image
from rich.progress import track
from skimage.metrics import peak_signal_noise_ratio

from man_mm.engine.quiet import quiet

_CROP = 96  # pixels of the ground truth


def restore(
    cfg: Config, checkpoints: dict[str, str], count: int
) -> list[dict[str, np.ndarray]]:
    """Runs models on pictures of the validation set.

    Args:
        cfg: Config of the plain model.
        checkpoints: Path of each model's checkpoint, by its name.
        count: Number of pictures, taken evenly from the set.

    Returns:
        For each picture, images ``(H, W, 3)`` of 8 bits: ``'input'``, one for each
        model, ``'ground truth'``.
    """
    models = {}
    for name, path in checkpoints.items():
        with quiet():
            model = MODELS.build(cfg.model).eval()
            load_checkpoint(model, path, map_location='cpu', strict=True)
        models[name] = model
    loader = {**cfg.val_dataloader, 'num_workers': 0, 'persistent_workers': False}
    dataset = Runner.build_dataloader(loader).dataset
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round()
    pictures = []
    for index in track(chosen.astype(int), 'pictures'):
        sample = dataset[int(index)]
        truth = _to_image(sample['data_samples'].gt_img)
        small = Image.fromarray(_to_image(sample['inputs']))
        large = small.resize(truth.shape[1::-1], Image.BICUBIC)
        images = {'input': np.asarray(large)}
        for name, model in models.items():
            again = dataset[int(index)]  # mmagic changes its samples
            batch = {key: [again[key]] for key in ('inputs', 'data_samples')}
            with torch.no_grad():
                (restored,) = model.test_step(batch)
            # What mmagic returns for evaluation is in BGR.
            images[name] = _to_image(restored.output.pred_img.flip(0))
        pictures.append({**images, 'ground truth': truth})
    return pictures


def _to_image(tensor: torch.Tensor) -> np.ndarray:
    return tensor.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()


def draw(pictures: Sequence[dict[str, np.ndarray]], scale: int, path: Path) -> None:
    """Draws one row a picture.

    Args:
        pictures: From `restore`.
        scale: Pixels at the border that do not count, as in the stock configs.
        path: PNG file.
    """
    columns = list(pictures[0])
    size = (2.6 * len(columns), 2.75 * len(pictures))
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for row, images in zip(axes, pictures, strict=True):
        top, left = _most_detailed(images['ground truth'])
        inner = {k: v[scale:-scale, scale:-scale] for k, v in images.items()}
        for axis, name in zip(row, columns, strict=True):
            axis.imshow(images[name][top : top + _CROP, left : left + _CROP])
            axis.set(xticks=[], yticks=[])
            title = name
            if name != 'ground truth':
                psnr = peak_signal_noise_ratio(inner['ground truth'], inner[name])
                title = f'{name}: {psnr:.2f} dB'
            axis.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _most_detailed(image: np.ndarray) -> tuple[int, int]:
    """Corner of the crop whose pixels differ most from their neighbours."""
    grey = image.astype(float).mean(2)
    detail = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    step = _CROP // 2
    corners = [
        (top, left)
        for top in range(0, image.shape[0] - _CROP + 1, step)
        for left in range(0, image.shape[1] - _CROP + 1, step)
    ]
    return max(
        corners, key=lambda c: detail[c[0] : c[0] + _CROP, c[1] : c[1] + _CROP].sum()
    )
