"""Records which submodule of a network runs when, and what operations read of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from man_mm.core.returned import tensor_of, tensors_in

from .token_maps import map_kind

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default)


@contextmanager
def recording(backbone: nn.Module, trace: Trace) -> Iterator[None]:
    """Records the calls of all blocks, and of nothing inside of them.

    A block is a submodule inside nothing but sequences, and stages: submodules that
    hold a list of others. Stages are recorded too.

    Args:
        backbone: The network that is run.
        trace: What the calls are recorded in.
    """
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, args: tuple) -> None:
            trace.calls.append(Call(name, module, args, trace.now))

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            call = next(c for c in reversed(trace.calls) if c.name == name)
            call.output, call.stop = output, trace.now

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    holders = {backbone}
    for name, module in backbone.named_modules():
        holder = backbone.get_submodule(name.rpartition('.')[0])
        if module is backbone or holder not in holders:
            continue
        is_sequence = _is_sequence(module)
        if is_sequence or any(isinstance(m, nn.ModuleList) for m in module.children()):
            holders.add(module)
        if not is_sequence:
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_sequence(module: nn.Module) -> bool:
    """Whether it does nothing but hold others, or run them one after another."""
    return isinstance(module, nn.ModuleList) or (
        type(module).forward is nn.Sequential.forward
    )


@dataclass
class Call:
    """A call of a block; times are numbers of operations.

    Attributes:
        name: Name of the submodule.
        module: The submodule.
        args: What it was called with.
        start: Time of its first operation.
        output: What it returned.
        stop: Time of the first operation after it.
    """

    name: str
    module: nn.Module
    args: tuple
    start: int
    output: Any = None
    stop: int = 0

    @property
    def input(self) -> Any:
        """The first of its arguments."""
        return self.args[0] if self.args else None

    @property
    def tensor(self) -> Any:
        """The tensor that it returned, alone or in front of a size."""
        return tensor_of(self.output)

    @property
    def has_weights(self) -> bool:
        """Whether it is more than a norm, an activation or a pooling."""
        return any(param.dim() > 1 for param in self.module.parameters())

    def is_in(self, other: Call) -> bool:
        """Whether it is a call inside another one."""
        return self.name.startswith(f'{other.name}.') and (
            other.start <= self.start and self.stop <= other.stop
        )

    def is_on(self, path: set[int]) -> bool:
        """Whether one of the operations of the path is in this call."""
        return not path.isdisjoint(range(self.start, self.stop))


@dataclass
class _Operation:
    reads: list[int]
    lays_out: bool  # and computes nothing
    writes: list[int] = field(default_factory=list)


class Trace(TorchDispatchMode):
    """Which operation reads and writes which tensor of an image or of parameters.

    Args:
        image: The image; what follows from it is recorded.
        params: Parameters; what follows from them, too.
    """

    def __init__(self, image: Tensor, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._operations: list[_Operation] = []
        self._kept: list[Tensor] = [image]  # so that each has an id of its own
        self._of_image = {id(image)}
        self._params = set(map(id, params))
        self._derived = {id(image), *self._params}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors_in((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        reads = [id(x) for x in given if id(x) in self._derived]
        operation = _Operation(reads, func.is_view or func in _COPIES)
        if operation.reads:
            changed = func._schema.is_mutable
            made = tensors_in(result)
            for tensor in made:
                if changed or not any(tensor is x for x in given):
                    operation.writes.append(id(tensor))
            self._kept += made
            self._derived.update(operation.writes)
            if not self._of_image.isdisjoint(operation.reads):
                self._of_image.update(operation.writes)
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
        return self.read_by(set(range(self.now)) - path)

    def read_by(self, times: Iterable[int]) -> set[int]:
        """Ids of the tensors that operations read."""
        return {x for time in times for x in self._operations[time].reads}

    def made_by(self, times: Iterable[int]) -> set[int]:
        """Ids of the tensors that operations wrote."""
        return {x for time in times for x in self._operations[time].writes}

    def follows_from_image(self, value: Any) -> bool:
        """Whether it is a tensor that was computed from the image."""
        return isinstance(value, Tensor) and id(value) in self._of_image

    def reads_image(self, call: Call) -> bool:
        """Whether anything in a call was computed from the image."""
        return not self._of_image.isdisjoint(self.read_by(range(call.start, call.stop)))

    def can_cut(self, call: Call) -> bool:
        """Whether a call's output is a map, and all that goes on from there."""
        if map_kind(call.tensor) is None:
            return False
        later = range(call.stop, self.now)
        if id(call.tensor) in self.made_by(later):
            return False  # it is changed in place
        earlier = self.made_by(range(call.stop)) | {id(self._kept[0])}
        return self.read_by(later) & earlier <= {id(call.tensor)}

    def hands_on(self, call: Call, following: Call, path: set[int]) -> bool:
        """Whether a call takes what the one before it returned.

        As it is, or laid out in another way, such as tokens as a map.

        Args:
            call: A call.
            following: The next one on the path.
            path: The operations on the path.
        """
        if following.input is call.tensor:
            return True
        between = self._between(call, following, path)
        return id(following.input) in self.made_by(between) and all(
            self._operations[time].lays_out for time in between
        )

    def is_end(
        self, call: Call, following: Call, path: set[int], read_beside: set[int]
    ) -> bool:
        """Whether the backbone returns what a call hands on to the following one.

        That is its output, or what follows from it without any parameter.

        Args:
            call: A call.
            following: The next one on the path.
            path: The operations on the path.
            read_beside: Ids of the tensors that are read elsewhere, too.
        """
        if following.input is call.tensor:
            return id(call.tensor) in read_beside
        between = self._between(call, following, path)
        made = self.made_by(between)
        return id(following.input) in made and (
            not made.isdisjoint(read_beside)
            and self._params.isdisjoint(self.read_by(between))
        )

    def _between(self, call: Call, following: Call, path: set[int]) -> set[int]:
        return path.intersection(range(call.stop, following.start))
