"""Operators as they are on a GPU, in steps that are not computed on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextmanager
def cuda_operators() -> Iterator[None]:
    """Lets models call what has the bytes of operators on a GPU, and maybe no values.

    On a CPU, mmcv composes multi-scale deformable attention of operators of PyTorch,
    which keep the sampled values of every query; its operator for GPUs keeps its inputs
    only. Dropout keeps a factor for each value on a CPU, and a byte on a GPU. Tensors
    that a model moves to a GPU stay where they are.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, 'cuda', _stays))
        stack.enter_context(patch.object(nn.functional, 'dropout', _dropout))
        try:
            from mmcv.ops import multi_scale_deform_attn as attention
        except ImportError:  # no mmcv, or one without operators
            pass
        else:
            name = 'multi_scale_deformable_attn_pytorch'
            apply = _DeformableAttention.apply
            stack.enter_context(patch.object(attention, name, apply))
        yield


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or p == 0:
        return input
    out, _ = torch.native_dropout(input, p, True)
    return input.copy_(out) if inplace else out


def _stays(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


class _DeformableAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(value, shapes, locations, weights)
        batch, _, heads, channels = value.shape
        return value.new_empty(batch, locations.shape[1], heads * channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, _, locations, weights = ctx.saved_tensors
        grad.contiguous()
        return (
            torch.zeros_like(value),
            None,
            torch.zeros_like(locations),
            torch.zeros_like(weights),
        )
