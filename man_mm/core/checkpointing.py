"""Activation checkpointing inside modules: ours, and that of the network itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .patches import Wrap


def recomputed(*submodules: nn.Module) -> Wrap:
    """Wraps a forward function so that the backward pass computes activations again.

    ``torch.utils.checkpoint`` without reentrance, so that no input has to require
    grad. Batch norms update their running statistics in the first pass only.

    Args:
        *submodules: What the forward function runs.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), statistics_kept(*submodules)

    return lambda forward: partial(
        checkpoint, forward, use_reentrant=False, context_fn=contexts
    )


@contextmanager
def statistics_kept(*submodules: nn.Module) -> Iterator[None]:
    """Batch norms normalise as usual but do not update their running statistics.

    Args:
        *submodules: What holds the batch norms.
    """
    kept = [
        (module, module.momentum, module.num_batches_tracked)
        for submodule in submodules
        for module in submodule.modules()
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
    ]
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpoints_itself(submodule: nn.Module) -> bool:
    """Whether OpenMMLab blocks in a submodule checkpoint themselves.

    Args:
        submodule: What to search for ``with_cp`` and ``use_checkpoint``.
    """
    options = ('with_cp', 'use_checkpoint')
    return any(getattr(m, o, False) for m in submodule.modules() for o in options)


def require_grad(tensor: Tensor) -> Tensor:
    """A tensor that requires grad, but never gets one.

    Blocks checkpoint themselves only if their input requires grad. A leaf would stay
    alive, with a gradient, as long as the loss does.
    """
    return _RequireGrad.apply(tensor, torch.empty(0, requires_grad=True))


class _RequireGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, _source: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, _grad: Tensor) -> tuple[None, None]:
        return None, None


def check_cut(name: str, output: Any, requires_grad: bool = True) -> None:
    """Refuses a cut behind which nothing could be back-propagated.

    Args:
        name: Dotted name of the submodule after which the cut is.
        output: What it returned.
        requires_grad: Whether that has to do with gradients, as it must. Defaults to
            True.

    Raises:
        RuntimeError: If it is not one tensor, or the region runs without gradients.
    """
    if not isinstance(output, Tensor):
        raise RuntimeError(
            f'The cut {name!r} returns {type(output).__name__}, not one tensor: cut '
            'elsewhere.'
        )
    if in_checkpoint() or not (torch.is_grad_enabled() and requires_grad):
        raise RuntimeError(
            f'The cut {name!r} ran without gradients. It may lie inside a region that '
            'is checkpointed or run under no_grad: move the cut to the end of that '
            'region, or leave the region out of activation_checkpointing.'
        )


def in_checkpoint() -> bool:
    """Whether a non-reentrant region runs, which would be recomputed without cuts."""
    hooks = top_saved_tensors_hooks()
    return bool(hooks) and hooks[0].__module__ == 'torch.utils.checkpoint'


def top_saved_tensors_hooks() -> tuple | None:
    """The innermost pair of hooks on saved tensors, or None."""
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return top(True) if top else None
