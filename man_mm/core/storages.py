"""The storages behind tensors, and their bytes."""

import torch
from torch import Tensor, nn


def tensor_bytes(obj: object) -> int:
    """Return the bytes of the distinct storages in ``obj``.

    Args:
        obj: A tensor, a module (its parameters and buffers), an optimizer (its
            state), or lists, tuples, sets and dicts of these, nested at will.
            Anything else counts nothing.

    Returns:
        Bytes; a storage counts whole and once, however many tensors share it.

    Raises:
        NotImplementedError: If ``obj`` holds a sparse tensor.

    Examples:
        >>> import torch
        >>> from man_mm.core.storages import tensor_bytes
        >>> x = torch.zeros(100)
        >>> tensor_bytes([x, x[:10]])
        400
    """
    return sum({s._cdata: s.nbytes() for s in find_storages(obj)}.values())


def find_storages(obj: object) -> list[torch.UntypedStorage]:
    """Storages in ``obj``, which is anything that `tensor_bytes` takes.

    Args:
        obj: Tensors, modules, optimizers, and containers of these.
    """
    found, todo = [], [obj]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item.untyped_storage())
        elif isinstance(item, (list, tuple, set)):
            todo.extend(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, torch.UntypedStorage):
            found.append(item)
        elif isinstance(item, nn.Module):
            todo += [*item.parameters(), *item.buffers()]
        elif isinstance(item, torch.optim.Optimizer):
            todo.append(item.state)
    return found
