"""Tensors whose memory is that of files, which the system may move to the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

_SMALL = 2**16  # bytes that are not worth a file


def empty_on_disk(like: Tensor, folder: str | Path) -> Tensor:
    """A tensor on the CPU whose memory is a file's, to which the system may move it.

    The file is gone with the tensor.

    Args:
        like: A tensor of its shape and type.
        folder: Where there is room for the file. It should not lie in memory itself.

    Returns:
        A tensor without values; in plain memory if it is small, or without room.
    """
    nbytes = like.numel() * like.element_size()
    if nbytes >= _SMALL:
        try:
            with NamedTemporaryFile(dir=folder, prefix='.tensor-') as file:
                # Otherwise a full disk is noticed where it is written to, by a crash.
                os.posix_fallocate(file.fileno(), 0, nbytes)
                flat = torch.from_file(
                    file.name, shared=True, size=like.numel(), dtype=like.dtype
                )
            return flat.view(like.shape)
        except (OSError, AttributeError):  # no room, or no such function
            pass
    return torch.empty(like.shape, dtype=like.dtype)


@contextmanager
def parameters_on_disk(folder: str | Path) -> Iterator[None]:
    """Puts parameters of modules that are built within on disk, before they are drawn.

    Args:
        folder: See `empty_on_disk`.
    """
    # Some networks use a parameter twice, under its old name or its new one.
    moved = WeakIdKeyDictionary()

    def move(_module: nn.Module, _name: str, param: nn.Parameter) -> nn.Parameter:
        if type(param) is not nn.Parameter or param.device.type != 'cpu':
            return param
        if param not in moved:
            data = empty_on_disk(param, folder).copy_(param.data)
            moved[param] = nn.Parameter(data, param.requires_grad)
            moved[moved[param]] = moved[param]
        return moved[param]

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()
