"""Losses of a dense head of one anchor a location, without a read of a value.

They are mmdet's: binary cross entropy for classes and centerness, GIoU for boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .atss import Targets
from .box_math import decode, generalized_overlaps


def class_loss(scores: Sequence[Tensor], targets: Targets) -> Tensor:
    """Binary cross entropy of all classes at all anchors on an image, summed.

    Args:
        scores: Logits ``(N, C, H, W)`` of each level.
        targets: What the anchors learn.
    """
    sizes = [score.shape[-2:].numel() for score in scores]
    labels = targets.labels.split(sizes, 1)
    inside = [None] * len(sizes)
    if targets.inside is not None:
        inside = targets.inside.split(sizes, 1)
    return sum(
        _ClassLoss.apply(score.flatten(2), *target)
        for score, *target in zip(scores, labels, inside, strict=True)
    )


def box_losses(
    offsets: Sequence[Tensor],
    centerness: Sequence[Tensor],
    targets: Targets,
    coder: Any,
) -> tuple[Tensor, Tensor]:
    """GIoU loss, weighted by centerness, and cross entropy of centerness, summed.

    Args:
        offsets: Predicted boxes ``(N, 4, H, W)`` of each level.
        centerness: Logits ``(N, 1, H, W)`` of each level.
        targets: What the anchors learn.
        coder: The coding of the predicted boxes.
    """
    predicted = decode(targets.anchors, _at(offsets, targets.positions), coder)
    distance = 1 - generalized_overlaps(predicted, targets.boxes)
    entropy = F.binary_cross_entropy_with_logits(
        _at(centerness, targets.positions)[:, 0],
        targets.centerness,
        targets.is_positive,
        reduction='sum',
    )
    return (distance * targets.centerness).sum(), entropy


def _at(maps: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Values ``(P, C)`` of maps ``(N, C, H, W)`` of all levels at P positions."""
    joined = torch.cat([map_.flatten(2) for map_ in maps], 2)
    return joined.transpose(1, 2).flatten(0, 1).index_select(0, positions)


class _ClassLoss(torch.autograd.Function):
    """Saves logits and labels, where autograd would save one-hot targets too.

    Of logits ``(N, C, A)``, labels ``(N, A)``, and 1 or 0 for each anchor or None.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, inside: Tensor | None):
        is_object = (labels < logits.shape[1])[:, None]
        index = torch.where(is_object, labels[:, None], 0)
        ctx.save_for_backward(logits, index, is_object, inside)
        # Softplus of the logits. `log1p` would take ten times as long, for digits that
        # are lost in the sum.
        losses = logits.clamp(min=0).sum(1) - logits.abs().sigmoid_().log_().sum(1)
        losses -= (logits.gather(1, index) * is_object)[:, 0]
        return (losses if inside is None else losses * inside).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, index, is_object, inside = ctx.saved_tensors
        shares = logits.sigmoid()
        shares.scatter_(1, index, shares.gather(1, index) - is_object.to(shares))
        if inside is not None:
            shares.mul_(inside[:, None])
        return shares.mul_(grad), None, None
