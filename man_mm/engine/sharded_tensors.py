"""Tensors of which each process keeps a part: norms, clipping, loading, saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.utils.misc import apply_to
from torch import Tensor, nn
from torch.optim import Optimizer

from .disk_tensors import empty_on_disk
from .distributed import gradient_norm, is_sharded


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm of gradients taken together, some of which may be sharded.

    The parts of all sharded gradients take one message together, where
    ``torch.nn.utils.get_total_norm`` sends one for each gradient.

    Args:
        grads: Gradients, at least one.
        norm_type: Order of the norm. Defaults to 2.

    Returns:
        A scalar, equal on all processes.
    """
    sharded = [grad for grad in grads if is_sharded(grad)]
    whole = [grad for grad in grads if not is_sharded(grad)]
    norms = [gradient_norm(whole, norm_type)] if whole else []
    if sharded:
        parts = [grad.to_local() for grad in sharded]
        parts = [part for part in parts if part.numel()]
        own = gradient_norm(parts, norm_type) if parts else grads[0].new_zeros(())
        mesh = sharded[0].device_mesh
        group = mesh.get_group(mesh.ndim - 1)  # the other dimension holds copies
        others = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        torch.distributed.all_gather(others, own, group=group)
        norms += others
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def clip_norm(
    params: Sequence[nn.Parameter], max_norm: float, norm_type: float | str = 2.0
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for gradients some of which are sharded.

    Args:
        params: Parameters with gradients.
        max_norm: Norm that all gradients together will have at most.
        norm_type: Order of the norm, ``'inf'`` for the maximum. Defaults to 2.

    Returns:
        The norm before, a scalar.
    """
    grads = [param.grad for param in params]
    norm = total_norm(grads, float(norm_type))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for grad in grads:
        part = grad.to_local() if is_sharded(grad) else grad
        part.mul_(factor.to(part.device))
    return norm


def free_parts(params: Iterable[Tensor]) -> None:
    """Frees this process's parts of sharded parameters, which are of no use any more.

    FSDP itself keeps whatever it has sharded once.

    Args:
        params: Parameters; those that are not sharded are left alone.
    """
    for param in filter(is_sharded, params):
        param.to_local().untyped_storage().resize_(0)


def shard_like(value: Any, param: Tensor) -> Any:
    """This process's part of a value that belongs to a sharded parameter.

    Args:
        value: What a checkpoint holds, the same on every process.
        param: The parameter.

    Returns:
        A DTensor laid out as ``param``, if that is sharded and of the value's shape;
        else the value.
    """
    fits = isinstance(value, Tensor) and value.shape == param.shape
    if not (is_sharded(param) and fits) or is_sharded(value):
        return value
    # Without messages, because the first process checks checkpoints alone.
    mesh, dim = param.device_mesh, param.device_mesh.ndim - 1
    parts = value.chunk(mesh.size(dim))
    index = mesh.get_local_rank(dim)
    sharded = torch.empty_like(param, requires_grad=False)
    if index < len(parts):
        sharded.to_local().copy_(parts[index])
    return sharded


def shard_loaded_weights(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """A ``load_state_dict`` pre-hook: whole weights load into sharded parameters."""
    for name, param in module.named_parameters(recurse=False):
        if (key := prefix + name) in state_dict:
            state_dict[key] = shard_like(state_dict[key], param)


def shard_optimizer_state(
    state_dict: dict[str, Any], optimizer: Optimizer
) -> dict[str, Any]:
    """An optimizer's state dict in which each tensor is laid out as its parameter.

    Args:
        state_dict: Of an optimizer with the same groups, with whole tensors.
        optimizer: The optimizer that will load it.
    """
    params = [param for group in optimizer.param_groups for param in group['params']]
    state = {
        index: {key: shard_like(value, params[index]) for key, value in values.items()}
        for index, values in state_dict['state'].items()
    }
    return {**state_dict, 'state': state}


def gather_on_first(data: Any, folder: str | Path) -> Any:
    """Whole tensors in place of sharded ones, on the disk of the first process.

    All processes have to call it. Tensors are gathered one by one, so a process holds
    one whole tensor at a time, in memory that is not a file's.

    Args:
        data: Tensors, in dictionaries and lists.
        folder: Where there is room for all of them; see `empty_on_disk`.

    Returns:
        The same structure on the CPU; on other processes than the first with None for
        sharded tensors.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        if not is_sharded(tensor):
            return tensor.cpu()
        kept = empty_on_disk(tensor, folder) if dist.is_main_process() else None
        # Those that are offloaded travel by way of their device.
        whole = tensor.to(tensor.device_mesh.device_type).full_tensor()
        return None if kept is None else kept.copy_(whole)

    return apply_to(data, torch.is_tensor, gather)
