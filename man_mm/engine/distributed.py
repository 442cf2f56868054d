"""Keeping ranks equal: gradients of a module, auxiliary heads, long-term memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine import dist
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each process has a part."""
    return hasattr(tensor, 'full_tensor')


def average_gradients(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Starts to average gradients over all ranks, beside what runs next.

    Each gradient is sent once, in one message for all of a dtype. A parameter without
    a gradient on some ranks counts as zero there, and keeps ``grad=None`` if no rank
    used it, so that every rank takes part in the same reductions and no optimizer step
    is made up. Sharded parameters are left out: FSDP has averaged their gradients.

    Args:
        params: Parameters, the same and in the same order on every rank.

    Returns:
        Waits for the averages, and puts them into ``grad``. Does nothing on one rank.
    """
    if dist.get_world_size() == 1:
        return _nothing
    groups = defaultdict(list)
    for param in params:
        if not is_sharded(param):
            groups[param.device, param.dtype].append(param)
    waits = [_start(group) for group in groups.values()]
    return lambda: [wait() for wait in waits]


def _start(params: Sequence[nn.Parameter]) -> Callable[[], None]:
    unused = [index for index, param in enumerate(params) if param.grad is None]
    used = params[0].new_ones(len(params))
    for index in unused:
        used[index] = 0
    # Zeros are as long as their parameters: other ranks may have these gradients.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([*(grad.flatten() for grad in grads), used])
    flat /= dist.get_world_size()
    for param in params:
        param.grad = None  # the message is its only copy
    work = torch.distributed.all_reduce(flat, async_op=True)

    def wait() -> None:
        _wait_for(work)
        sizes = [param.numel() for param in params]
        *averages, is_used = flat.split([*sizes, len(params)])
        # What this rank has used is used; only of the rest it has to read anything.
        others = is_used.tolist() if unused else []
        for index, (param, average) in enumerate(zip(params, averages, strict=True)):
            if index not in unused or others[index] > 0:
                param.grad = average.view_as(param)

    return wait


def _nothing() -> None:
    pass


def _wait_for(work: Any) -> None:
    """Waits for a collective operation.

    Raises:
        RuntimeError: If another rank does not take part; tells what to do.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            'Another rank has died or hangs, so gradients cannot be averaged: see '
            'its output. Restart with --resume. Ranks wait for each other '
            f'env_cfg.dist_cfg.timeout seconds. {error}'
        ) from error


def gradient_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of the gradients of this rank, taken together.

    Args:
        grads: Gradients, at least one.
        norm_type: Order of the norm. Defaults to 2.
    """
    norms = [torch.linalg.vector_norm(grad, norm_type) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def average_tensors(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over all ranks, in place; does nothing on one rank."""
    if dist.get_world_size() > 1 and tensors:
        dist.all_reduce_params(list(tensors), op='mean')


def broadcast_module(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor)


def share_random_state() -> None:
    """Gives ranks that were seeded as rank 0 its random state on the CPU."""
    seed = torch.initial_seed()
    shared = [seed, torch.get_rng_state()]
    dist.broadcast_object_list(shared)
    if shared[0] == seed:
        torch.set_rng_state(shared[1])
