"""Keeping ranks equal: gradients of a module, auxiliary heads, long-term memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine import dist
from torch import Tensor, nn


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Averages gradients over all ranks, in place; does nothing on one rank.

    A parameter without a gradient on some ranks only counts as zero there, and keeps
    ``grad=None`` if no rank used it, so that every rank takes part in the same
    reductions and no optimizer step is made up.
    """
    if dist.get_world_size() == 1 or not params:
        return
    used = torch.tensor([float(p.grad is not None) for p in params])
    used = used.to(params[0].device)
    dist.all_reduce(used, op='max')
    grads = []
    for param, is_used in zip(params, used.tolist(), strict=True):
        if is_used:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            grads.append(param.grad)
    average_tensors(grads)


def average_tensors(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over all ranks, in place; does nothing on one rank."""
    if dist.get_world_size() > 1 and tensors:
        dist.all_reduce_params(list(tensors), op='mean')


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor)
