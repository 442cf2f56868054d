"""Finds the units of a backbone that has no adapter, from one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from man_mm.core import Unit

_STAGES = 4  # of a network that has none of its own


def discover_units(backbone: nn.Module, image: Tensor) -> list[Unit]:
    """Lists the units of a backbone: the blocks between which one map is handed on.

    The backbone runs once without gradients. A block is a submodule inside nothing
    but ``nn.Sequential`` and ``nn.ModuleList``. The network can be cut behind a block
    that outputs a map ``(N, C, H, W)`` if that map is all that later operations read
    of what was computed before, if nothing changes it in place, and if the next block
    takes it as its first argument. Blocks between which it cannot be cut form one
    unit, and so do convolutions with the norms and activations behind them.

    A stage ends where the backbone returns a map, or, if it returns one only, where
    the resolution falls. A network of one resolution has four equal stages.

    Args:
        backbone: A network that takes images; in evaluation mode.
        image: Image ``(N, C, H, W)`` of a size that it takes.

    Returns:
        The units in the order in which they run; none if the network computes on
        tokens, or on several paths from the start.
    """
    trace = _Trace(image)
    with torch.no_grad(), _recording(backbone, trace), trace:
        outputs = [x for x in tree_leaves(backbone(image)) if isinstance(x, Tensor)]
    if not outputs:
        return []
    path = trace.ancestors(outputs[-1])
    read_beside = trace.read_outside(path) | {id(x) for x in outputs[:-1]}
    groups = _group(trace, path, read_beside)
    if not groups or any(_leaks(trace, group, read_beside) for group in groups[:-1]):
        return []
    maps = [group[-1].output for group in groups]
    ends = [id(map_) in read_beside for map_ in maps[:-1]]
    stages = _stages([map_.shape[-1] for map_ in maps], ends)
    return [
        Unit(
            group[-1].name,
            stage,
            tuple(call.name for call in group),
            read_elsewhere=end,
            as_map=None if _is_chain(group) else _the_map,
        )
        for group, stage, end in zip(groups, stages, [*ends, False], strict=True)
    ]


def _group(trace: _Trace, path: set[int], read_beside: set[int]) -> list[list[_Call]]:
    """Groups the calls on the path by units, up to the last one with weights."""
    uses = Counter(id(call.module) for call in trace.calls)
    calls = [
        call
        for call in trace.calls
        if call.is_on(path) and (uses[id(call.module)] == 1 or call.has_weights)
    ]
    while calls and not (trace.can_cut(calls[-1]) and _belongs(calls[-1], calls)):
        calls.pop()
    groups: list[list[_Call]] = [[]]
    for call, following in zip(calls, [*calls, None][1:], strict=True):
        groups[-1].append(call)
        if following is not None and trace.can_cut(call):
            starts = following.has_weights or id(call.output) in read_beside
            if starts and following.input is call.output:
                groups.append([])
    return groups if calls else []


def _belongs(call: _Call, calls: Sequence[_Call]) -> bool:
    """Whether the last call ends a unit: no global pooling, nor what follows one."""
    return call.has_weights or (
        any(call.input is other.output for other in calls)
        and call.input.shape[2:] == call.output.shape[2:]
    )


def _leaks(trace: _Trace, group: Sequence[_Call], read_beside: set[int]) -> bool:
    """Whether a map inside a unit is read elsewhere: its graph would be gone."""
    made = trace.made_by(range(group[0].start, group[-1].stop))
    return not (made - {id(group[-1].output)}).isdisjoint(read_beside)


def _is_chain(group: Sequence[_Call]) -> bool:
    """Whether each block takes what the one before it returned, and nothing else."""
    return all(a.output is b.input for a, b in pairwise(group)) and all(
        call.is_unary for call in group
    )


def _the_map(map_: Tensor, _args: tuple) -> Tensor:
    """For units that take more than a map, but return one."""
    return map_


def _stages(widths: Sequence[int], ends: Sequence[bool]) -> list[int]:
    """The stage of each unit, -1 for a stem; ``ends`` lacks that of the last unit."""
    count = len(widths)
    if not any(ends):
        falls = zip(widths[1:], widths[2:], strict=False)
        ends = [False, *(here > after for here, after in falls)]
    if not any(ends):
        return [index * _STAGES // count for index in range(count)]
    stages = list(accumulate(ends[: count - 1], initial=0))
    return stages if ends and ends[0] else [-1, *stages[1:]]


@dataclass
class _Call:
    """A call of a block; times are numbers of operations."""

    name: str
    module: nn.Module
    input: Any
    is_unary: bool
    start: int
    output: Any = None
    stop: int = 0

    @property
    def has_weights(self) -> bool:
        """Whether it is more than a norm, an activation or a pooling."""
        return any(param.dim() > 1 for param in self.module.parameters())

    def is_on(self, path: set[int]) -> bool:
        """Whether one of the operations of the path is in this call."""
        return not path.isdisjoint(range(self.start, self.stop))


@dataclass
class _Operation:
    reads: list[int]
    writes: list[int] = field(default_factory=list)


class _Trace(TorchDispatchMode):
    """Which operation reads and writes which tensor that follows from an image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._operations: list[_Operation] = []
        self._kept: list[Tensor] = [image]  # so that each has an id of its own
        self._derived = {id(image)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        operation = _Operation([id(x) for x in given if id(x) in self._derived])
        if operation.reads:
            changed = func._schema.is_mutable
            made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            for tensor in made:
                if changed or not any(tensor is x for x in given):
                    operation.writes.append(id(tensor))
            self._kept += made
            self._derived.update(operation.writes)
        self._operations.append(operation)
        return result

    @property
    def now(self) -> int:
        """How many operations have run."""
        return len(self._operations)

    def ancestors(self, tensor: Tensor) -> set[int]:
        """Operations that a tensor depends on."""
        needed, found = {id(tensor)}, set()
        for time in reversed(range(self.now)):
            operation = self._operations[time]
            if not needed.isdisjoint(operation.writes):
                found.add(time)
                needed.update(operation.reads)
        return found

    def read_outside(self, path: set[int]) -> set[int]:
        """Ids of the tensors that other operations than these read."""
        others = set(range(self.now)) - path
        return {x for time in others for x in self._operations[time].reads}

    def made_by(self, times: Iterable[int]) -> set[int]:
        """Ids of the tensors that operations wrote."""
        return {x for time in times for x in self._operations[time].writes}

    def can_cut(self, call: _Call) -> bool:
        """Whether a call's output is a map, and all that goes on from there."""
        if not isinstance(call.output, Tensor) or call.output.dim() != 4:
            return False
        later = range(call.stop, self.now)
        if id(call.output) in self.made_by(later):
            return False  # it is changed in place
        earlier = self.made_by(range(call.stop)) | {id(self._kept[0])}
        read = {x for time in later for x in self._operations[time].reads}
        return read & earlier <= {id(call.output)}


@contextmanager
def _recording(backbone: nn.Module, trace: _Trace) -> Iterator[None]:
    """Records the calls of all blocks, and of nothing inside of them."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, args: tuple) -> None:
            first = args[0] if args else None
            trace.calls.append(_Call(name, module, first, len(args) == 1, trace.now))

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            call = next(c for c in reversed(trace.calls) if c.name == name)
            call.output, call.stop = output, trace.now

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    containers = {backbone}
    for name, module in backbone.named_modules():
        holder = backbone.get_submodule(name.rpartition('.')[0])
        if module is backbone or holder not in containers:
            continue
        if isinstance(module, nn.Sequential | nn.ModuleList):
            containers.add(module)
        else:
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
