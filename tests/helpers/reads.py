"""Counts how often a host reads values of tensors, for which it waits on a GPU."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# What returns a value to the host, or a tensor whose shape depends on values.
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class _Operators(TorchDispatchMode):
    """Lists all operators that run, or those that read."""

    def __init__(self, reads_only):
        super().__init__()
        self.reads_only, self.seen = reads_only, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if not self.reads_only or packet in READS or _is_masked(packet, args):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _is_masked(packet, args):
    """Whether an operator picks values by a mask, for which it looks up where."""
    if packet is aten.repeat_interleave:
        return isinstance(args[-1], torch.Tensor)
    masks = args[1] if packet in BY_MASK else ()
    return any(mask is not None and mask.dtype == torch.bool for mask in masks)


@contextmanager
def count_reads():
    """Yields a list; afterwards it has one entry a read."""
    reads, operators = [], _Operators(reads_only=True)

    def spy(read):
        def counting(tensor, *args):
            reads.append(read)
            return read(tensor, *args)

        return counting

    patches = [
        patch.object(torch.Tensor, name, spy(getattr(torch.Tensor, name)))
        for name in ('tolist', 'numpy')
    ]
    # As if tensors were on a GPU: on a CPU, steps are free to read.
    patches.append(patch('man_mm.engine.stepping.waits_for', lambda flag: True))
    with operators, patches[0], patches[1], patches[2]:
        yield reads
    reads.extend(operators.seen)


@contextmanager
def count_operators():
    """Yields a list; afterwards it has one entry for each operator that ran."""
    operators, seen = _Operators(reads_only=False), []
    with operators:
        yield seen
    seen.extend(operators.seen)
