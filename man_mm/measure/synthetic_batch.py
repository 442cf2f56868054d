"""A batch of random images and targets that a model can train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from man_mm.aux_heads.classifier import is_classifier
from man_mm.aux_heads.detector import heads_of, is_detector, num_classes
from man_mm.aux_heads.restorer import is_restorer
from man_mm.backbones import find_backbone, find_scale

OBJECTS = 8


def synthetic_batch(
    model: nn.Module, shape: Sequence[int], objects: int = OBJECTS
) -> dict[str, Any]:
    """Makes a batch as the model's data loader gives it; the same at every call.

    Args:
        model: A detector of mmdet, a classifier of mmpretrain or a super-resolution
            model of mmagic.
        shape: Shape ``(N, C, H, W)`` of the images, before padding.
        objects: Objects in an image of a detector, with masks if it predicts masks.
            Defaults to 8.

    Returns:
        What ``model.train_step`` and ``model.data_preprocessor`` take.

    Raises:
        ValueError: If the model is of another kind.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm.measure.synthetic_batch import synthetic_batch
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> batch = synthetic_batch(model, (2, 3, 32, 32))
        >>> [sample.gt_label.item() for sample in batch['data_samples']]
        [0, 1]
    """
    count, *image = shape
    if is_detector(model):
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            count,
            tuple(image),
            num_items=[objects] * count,
            num_classes=max(num_classes(model), 2),
            with_mask=_predicts_masks(model),
        )
    if is_classifier(model):
        from mmpretrain.structures import DataSample

        images = _images(shape)
        samples = [
            DataSample().set_gt_label(index % model.head.num_classes)
            for index in range(count)
        ]
        return dict(inputs=list(images), data_samples=samples)
    if is_restorer(model):
        from mmagic.structures import DataSample

        scale = find_scale(find_backbone(model)[1])
        channels, height, width = image
        small = _images(shape)
        large = _images((count, channels, scale * height, scale * width))
        samples = [DataSample(gt_img=x) for x in large]
        return dict(inputs=list(small), data_samples=samples)
    raise ValueError(
        f'There are no synthetic batches for a {type(model).__name__}, only for '
        'detectors of mmdet, for image classifiers and for super-resolution models '
        'with a pixel_loss.'
    )


def _predicts_masks(model: nn.Module) -> bool:
    heads = heads_of(model)
    with_mask = getattr(model, 'with_mask', False)
    return with_mask or any(hasattr(head, 'loss_mask') for head in heads)


def _images(shape: Sequence[int]) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, tuple(shape), generator=rng, dtype=torch.uint8)
