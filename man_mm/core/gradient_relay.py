"""Gradients that leave one graph and enter another one, later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def caught(tensor: Tensor, name: str, grads: dict[str, Tensor]) -> Tensor:
    """Hands a tensor to other readers, and catches the gradient that they send back.

    Args:
        tensor: Any tensor; no gradient reaches it.
        name: Key of the gradient.
        grads: Gets the sum of the gradients of all readers when they have been
            back-propagated; without any, it gets nothing.

    Returns:
        The same values, in the same memory, as a tensor that requires grad. Other
        than a leaf, it needs nobody to keep it alive.
    """
    return _Catch.apply(tensor, torch.empty(0, requires_grad=True), name, grads)


def injected(tensors: Sequence[Tensor], grads: list[Tensor]) -> Tensor:
    """A scalar whose backward pass sends given gradients to tensors.

    Args:
        tensors: Tensors of any shapes, at least one.
        grads: Their gradients. They are taken out of the list by the backward pass,
            which so can free each of them once it is used, and may be put in until
            then. Whatever reaches the scalar does not scale them.

    Returns:
        Zero, to which a loss can be added.
    """
    return _Inject.apply(grads, *tensors)


class _Catch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, _source: Tensor, name: str, grads: dict) -> Tensor:
        ctx.name, ctx.grads = name, grads
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        ctx.grads[ctx.name] = grad
        return None, None, None, None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grads: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx, _grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(ctx.grads)
        ctx.grads.clear()
        return None, *grads
