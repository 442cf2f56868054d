"""Max pooling that remembers a byte a value."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from .patches import Forward, Wrap


def light_max_pool(pool: nn.MaxPool2d) -> Wrap | None:
    """Wraps the forward function of a max pooling so that it saves bytes only.

    PyTorch saves the input, and for each value of the output the position of its
    maximum as a 64-bit integer. Within its window, 8 bits tell as much. Outputs and
    gradients are the same.

    Args:
        pool: The module.

    Returns:
        None if it returns indices, its windows are dilated, or they have over 256
        values.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from man_mm.core.max_pool import light_max_pool
        >>> pool = nn.MaxPool2d(2)
        >>> x = torch.arange(4.0, requires_grad=True)
        >>> light_max_pool(pool)(pool.forward)(x.view(1, 1, 2, 2)).sum().backward()
        >>> x.grad
        tensor([0., 0., 0., 1.])
    """
    height, width = _pair(pool.kernel_size)
    if pool.return_indices or _pair(pool.dilation) != (1, 1) or height * width > 256:
        return None

    def wrap(forward: Forward) -> Forward:
        def call(x: Tensor) -> Tensor:
            if x.dim() != 4 or not (x.requires_grad and torch.is_grad_enabled()):
                return forward(x)
            return _MaxPool.apply(x, pool)

        return call

    return wrap


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.MaxPool2d) -> Tensor:
        settings = (pool.kernel_size, pool.stride, pool.padding, 1, pool.ceil_mode)
        out, indices = F.max_pool2d(x, *settings, return_indices=True)
        rows, columns = _corners(out, pool)
        width = _pair(pool.kernel_size)[1]
        row = indices.div(x.shape[3], rounding_mode='floor')
        offset = indices.remainder_(x.shape[3]).sub_(columns)
        offset.add_(row.sub_(rows), alpha=width)
        ctx.save_for_backward(offset.to(torch.uint8))
        ctx.shape, ctx.pool = x.shape, pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (offset,) = ctx.saved_tensors
        rows, columns = _corners(grad, ctx.pool)
        kernel = _pair(ctx.pool.kernel_size)
        offset = offset.long()
        indices = offset.div(kernel[1], rounding_mode='floor').add_(rows)
        indices.mul_(ctx.shape[3]).add_(columns).add_(offset.remainder_(kernel[1]))
        # Of the input, the operation reads the shape only.
        x = grad.new_empty(1).expand(ctx.shape)
        pool = ctx.pool
        lists = [
            list(_pair(each))
            for each in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        ]
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x, *lists, pool.ceil_mode, indices
        ), None


def _corners(out: Tensor, pool: nn.MaxPool2d) -> tuple[Tensor, Tensor]:
    """First row ``(H, 1)`` and column ``(W,)`` of each window."""
    starts = []
    for axis in (0, 1):
        stride, padding = _pair(pool.stride)[axis], _pair(pool.padding)[axis]
        count = out.shape[2 + axis]
        starts.append(torch.arange(count, device=out.device) * stride - padding)
    return starts[0].unsqueeze(1), starts[1]
