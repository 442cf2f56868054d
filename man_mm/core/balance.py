"""Local gradients that are brought to the size of the network's own."""

from __future__ import annotations

import torch
from torch import Tensor

from .micro_batches import Maps

BALANCED = 'balanced'  # as a weight of local losses


def balanced(maps: Maps, name: str, grad: Tensor, share: float) -> Maps:
    """Hands maps to an auxiliary head, and scales what the head sends back.

    All gradients of the head are scaled by the same factor, so that the norm of the
    one at the cut is a share of the norm of what arrives there from behind. The
    parameters of the head learn from its loss as it is.

    Args:
        maps: What the head reads with a graph, each ``(N, C, H, W)``.
        name: Of the map at the cut.
        grad: The gradient that arrives at the cut from behind, of any layout.
        share: The share.

    Returns:
        The same maps; a backward pass reaches all of them at once.
    """
    names = list(maps)
    outputs = _Balance.apply(share * _norm(grad), names.index(name), *maps.values())
    return dict(zip(names, outputs, strict=True))


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, norm: Tensor, cut: int, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.norm, ctx.cut = norm, cut
        return tuple(map_.view_as(map_) for map_ in maps)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local = _norm(grads[ctx.cut])
        factor = torch.where(local > 0, ctx.norm / local, 0.0)
        return None, None, *(grad * factor.to(grad.dtype) for grad in grads)


def _norm(grad: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad, dtype=dtype)
