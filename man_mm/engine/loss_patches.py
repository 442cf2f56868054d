"""Elementwise losses of detectors that save nothing but logits and targets."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from man_mm.core.checkpointing import recomputed
from man_mm.core.patches import Forward, Wrap
from man_mm.core.sliced_losses import sliced_sum

from .unread_losses import unread

# Written in PyTorch, they save many maps of the size of the logits. None has a state,
# and each row of their predictions has a loss of its own.
ELEMENTWISE_LOSSES = (
    'DistributionFocalLoss',
    'FocalLoss',
    'GaussianFocalLoss',
    'QualityFocalLoss',
    'VarifocalLoss',
)
# Predictions that run at a time. A slice fits a core's cache; on a GPU, whose calls
# have their price, it is larger.
_SLICE = {'cpu': 2**17}
_SLICE_ELSEWHERE = 2**22
_EPS = torch.finfo(torch.float32).eps  # mmdet's, beside avg_factor


def loss_patches(*modules: nn.Module) -> list[tuple[nn.Module, Wrap]]:
    """Runs elementwise losses a few rows at a time, again in the backward pass.

    Gradients are bit-equal; the loss itself is summed in another order. Small losses,
    and calls that are no sum over rows, are recomputed as a whole. The operator of
    mmcv that computes the focal loss on CUDA is left alone.

    Args:
        *modules: What holds the losses of mmdet.
    """
    return [
        (loss, _sliced(loss))
        for module in modules
        for loss in module.modules()
        if type(loss).__name__ in ELEMENTWISE_LOSSES
    ]


def _sliced(loss: nn.Module) -> Wrap:
    def wrap(forward: Forward) -> Forward:
        signature = inspect.signature(forward)
        run = unread(loss, forward)
        whole = recomputed(loss)(run)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            if _is_fused(loss, **given):
                return forward(*args, **kwargs)
            rows = _rows(loss, **given)
            if rows is None:
                return whole(**given)
            return _reduced(loss, run, rows, **given)

        return call

    return wrap


def _is_fused(loss: nn.Module, pred: Tensor, target: Any, **_: Any) -> bool:
    """Whether mmdet calls the CUDA operator of mmcv, which saves little itself."""
    return (
        type(loss).__name__ == 'FocalLoss'
        and pred.is_cuda
        and not getattr(loss, 'activated', False)
        and pred.dim() != target.dim()
    )


def _rows(
    loss: nn.Module,
    pred: Tensor,
    target: Any,
    weight: Tensor | None = None,
    avg_factor: Any = None,
    reduction_override: str | None = None,
    **rest: Any,
) -> int | None:
    """Rows to run at a time, or None if the loss has to run as a whole."""
    reduction = reduction_override or loss.reduction
    count = len(pred) if pred.dim() else 0
    others = [*target] if isinstance(target, tuple | list) else [target]
    others += [] if weight is None else [weight]
    size = _SLICE.get(pred.device.type, _SLICE_ELSEWHERE)
    fits = (
        pred.numel() > size
        and reduction in ('mean', 'sum')
        and (avg_factor is None or reduction == 'mean')
        and not any(value is not None for value in rest.values())
        and all(len(other) == count and not other.requires_grad for other in others)
        # A vector of weights for a square of losses may be one of columns.
        and not (weight is not None and weight.dim() == 1 and {*pred.shape} == {count})
    )
    return max(1, size * count // pred.numel()) if fits else None


def _reduced(
    loss: nn.Module,
    forward: Forward,
    rows: int,
    pred: Tensor,
    target: Any,
    weight: Tensor | None = None,
    avg_factor: Any = None,
    reduction_override: str | None = None,
    **_: Any,
) -> Tensor:
    is_tuple = isinstance(target, tuple | list)
    width = 0  # losses a row

    def losses(some: Tensor, weights: Tensor | None, *targets: Tensor) -> Tensor:
        nonlocal width
        out = forward(
            some,
            targets if is_tuple else targets[0],
            weight=weights,
            reduction_override='none',
        )
        width = math.prod(out.shape[1:])
        return out

    targets = target if is_tuple else (target,)
    total = sliced_sum(losses, pred, [weight, *targets], rows)
    if avg_factor is not None:
        return total / (avg_factor + _EPS)
    if (reduction_override or loss.reduction) == 'sum':
        return total
    return total / (len(pred) * width)
