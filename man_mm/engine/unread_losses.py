"""mmdet's focal losses without the values that they read to make their targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from man_mm.core.patches import Forward


def unread(loss: nn.Module, forward: Forward) -> Forward:
    """The same forward function of a loss, for which the host of a GPU does not wait.

    ``FocalLoss`` asks for the range of its labels, and ``QualityFocalLoss`` for the
    positions of its positives. In the backward pass they would do so once more. Losses
    and gradients are bit-equal; other losses stay as they are.

    Args:
        loss: A loss of mmdet.
        forward: Its forward function.
    """
    if getattr(loss, 'activated', False):
        return forward
    if type(loss).__name__ == 'FocalLoss':

        def call(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
            if pred.dim() != target.dim():
                target = _is_class(pred, target)
            return forward(pred, target, **options)

        return call
    if type(loss).__name__ == 'QualityFocalLoss':
        return lambda pred, target, **options: _quality_focal_loss(
            loss, pred, target, **options
        )
    return forward


def _quality_focal_loss(
    loss: nn.Module,
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None = None,
    avg_factor: Any = None,
    reduction_override: str | None = None,
) -> Tensor:
    """Logits ``(N, C)`` against qualities ``(N, C)``, or labels and qualities (N,)."""
    from mmdet.models.losses.utils import weight_reduce_loss

    if not isinstance(target, Tensor):
        labels, quality = target
        target = torch.where(_is_class(pred, labels), quality[:, None], 0)
    target = target.type_as(pred)
    losses = F.binary_cross_entropy_with_logits(pred, target, reduction='none')
    losses = losses * (target - pred.sigmoid()).abs().pow(loss.beta)
    reduction = reduction_override or loss.reduction
    losses = weight_reduce_loss(losses.sum(1), weight, reduction, avg_factor)
    return loss.loss_weight * losses


def _is_class(pred: Tensor, labels: Tensor) -> Tensor:
    """One-hot labels ``(N, C)``; none for the label C of background."""
    return labels[:, None] == torch.arange(pred.shape[1], device=labels.device)
