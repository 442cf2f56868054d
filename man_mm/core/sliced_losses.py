"""Losses that are sums over rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compressed_activations import uncompressed
from .micro_batches import slices_of

RowLoss = Callable[..., Tensor]


def sliced_sum(
    fn: RowLoss, pred: Tensor, others: Sequence[Tensor | None], rows: int
) -> Tensor:
    """Sums a loss over rows, and saves predictions and targets only.

    An elementwise loss written in PyTorch makes and saves a dozen maps of the size of
    its logits. Here, it runs without a graph on some rows at a time, and in the
    backward pass once more with one, so that such maps are as small as a slice. The
    gradient is that of the loss's own operations: bit-equal, whatever the slices.

    Args:
        fn: Called as ``fn(pred, *others)`` with the same rows of each; returns losses
            that depend on their own row only. It draws no random numbers.
        pred: Predictions ``(N, ...)``, the only ones that get a gradient.
        others: Targets and weights ``(N, ...)``; None is passed on.
        rows: Rows at a time.

    Returns:
        The sum, a scalar of the dtype of the losses, accumulated in float32 at least.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import binary_cross_entropy_with_logits as loss
        >>> from man_mm.core.sliced_losses import sliced_sum
        >>> logits, targets = torch.zeros(5, 2, requires_grad=True), torch.ones(5, 2)
        >>> sliced_sum(loss, logits, [targets], rows=5).backward()
        >>> logits.grad[0]
        tensor([-0.0500, -0.0500])
    """
    present = [other for other in others if other is not None]

    def call(some: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return fn(some, *(None if x is None else next(left) for x in others))

    return _SlicedSum.apply(pred, call, rows, *present)


class _SlicedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, fn: RowLoss, rows: int, *others: Tensor):
        ctx.save_for_backward(pred, *others)
        ctx.fn, ctx.rows = fn, rows
        kind = pred.device.type
        ctx.autocast = dict(
            device_type=kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
        )
        total, dtype = 0, pred.dtype
        for some in slices_of(len(pred), rows):
            loss = fn(*(x[some] for x in (pred, *others)))
            dtype = loss.dtype
            total = total + loss.sum(dtype=torch.promote_types(dtype, torch.float32))
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, *others = ctx.saved_tensors
        grad_pred = torch.empty_like(pred)
        for some in slices_of(len(pred), ctx.rows):
            with torch.enable_grad(), torch.autocast(**ctx.autocast), uncompressed():
                leaf = pred[some].detach().requires_grad_()
                loss = ctx.fn(leaf, *(other[some] for other in others))
            (grad_pred[some],) = torch.autograd.grad(loss, leaf, grad.expand_as(loss))
        return grad_pred, None, None, *[None] * len(others)
