"""Counts how often a host reads values of tensors, for which it waits on a GPU."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Scalars(TorchDispatchMode):
    """Single values: ``item``, ``bool``, ``float``, and what operators read."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_reads():
    """Yields a list; afterwards it has one entry a read."""
    reads, scalars = [], _Scalars()

    def spy(read):
        def counting(tensor, *args):
            reads.append(read)
            return read(tensor, *args)

        return counting

    patches = [
        patch.object(torch.Tensor, name, spy(getattr(torch.Tensor, name)))
        for name in ('tolist', 'numpy')
    ]
    with scalars, patches[0], patches[1]:
        yield reads
    reads.extend(['scalar'] * scalars.count)
