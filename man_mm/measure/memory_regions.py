"""Which group of modules an op of a training step belongs to."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

Groups = Mapping[str, nn.Module | Sequence[nn.Module]]

OTHER = 'other'
_ACCUMULATE = 'torch::autograd::AccumulateGrad'
_NO_BACKWARD = -1


class Regions:
    """Knows to which group of modules the running op belongs.

    In a forward pass, it is the innermost group whose forward is running. In a
    backward pass, it is the group that made the running node of the graph: nodes are
    numbered as they are made. Where a gradient is accumulated, it is the innermost
    group that the parameter is in. For all else, it is ``'other'``. What non-reentrant
    checkpointing computes again outside of an inner group belongs to the group whose
    backward pass asks for it first.

    Args:
        groups: Modules, or lists of them, by the name of their group.

    Attributes:
        owners: Names of groups by parameter.
        leaf: The tensor whose gradient is being accumulated, weakly, or None.
        in_backward: Whether the running op is part of a backward pass.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = {
            module: name
            for name, modules in groups.items()
            for module in ([modules] if _is_one(modules) else modules)
        }
        self.owners = dict(self._owned())
        self.leaf: weakref.ref[Tensor] | None = None
        self.in_backward = False
        self._open: list[tuple[str, int, object]] = []
        self._starts, self._names = [0], [OTHER]
        self._next = torch.autograd._get_sequence_nr()

    def advance(self) -> str:
        """Finds the running region, to which the newest nodes also belong."""
        region = self._locate()
        following = torch.autograd._get_sequence_nr()
        if following != self._next:
            if region != self._names[-1]:
                self._starts.append(self._next)
                self._names.append(region)
            self._next = following
        return region

    def enter(self, region: str, key: object) -> None:
        """Opens a region; ``key`` identifies it for `leave`."""
        self.advance()
        self._open.append((region, torch._C._current_graph_task_id(), key))

    def leave(self, key: object) -> None:
        """Closes the region opened with ``key``, and any left open inside it."""
        self.advance()
        # After an error, inner regions may still be open.
        while self._open and self._open.pop()[2] is not key:
            pass

    @contextmanager
    def inside(self, region: str) -> Iterator[None]:
        """Counts what runs in a ``with`` block as a region."""
        key = object()
        self.enter(region, key)
        try:
            yield
        finally:
            self.leave(key)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follows the forward passes of all groups."""
        with ExitStack() as stack:
            # Nodes of other threads would have the same numbers.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for module, name in self._groups.items():
                before = partial(self._before, name)
                for handle in (
                    module.register_forward_pre_hook(before, prepend=True),
                    module.register_forward_hook(self._after, always_call=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _before(self, name: str, module: nn.Module, _args: tuple) -> None:
        self.enter(name, module)

    def _after(self, module: nn.Module, _args: tuple, _output: object) -> None:
        self.leave(module)

    def _locate(self) -> str:
        task = torch._C._current_graph_task_id()
        self.in_backward = task != _NO_BACKWARD
        node = torch._C._current_autograd_node() if self.in_backward else None
        accumulates = node is not None and node.name() == _ACCUMULATE
        variable = node.variable if accumulates else None
        self.leaf = weakref.ref(variable) if accumulates else None
        # What was entered before this backward pass is only where it was started.
        if self._open and self._open[-1][1] == task:
            return self._open[-1][0]
        if accumulates:
            return self.owners.get(variable, OTHER)
        if node is not None:
            index = bisect_right(self._starts, node._sequence_nr()) - 1
            return self._names[index]
        return OTHER

    def _owned(self) -> Iterator[tuple[Tensor, str]]:
        """Parameters with the innermost group that they are in."""
        for module, name in self._groups.items():
            todo = [module]
            while todo:
                inner = todo.pop()
                yield from ((p, name) for p in inner.parameters(recurse=False))
                todo += [m for m in inner.children() if m not in self._groups]


def _is_one(modules: object) -> bool:
    # A ModuleList is never called itself.
    return isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList)
