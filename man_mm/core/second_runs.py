"""A module that runs without a graph first, and once more for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .between import Between
from .checkpointing import statistics_kept
from .micro_batches import slices_of, write_slices
from .partition import LocalModule, outlets
from .patches import Forward
from .random_states import RandomState, random_state_kept
from .returned import sizes_of, tensor_of


@dataclass(frozen=True)
class _Call:
    """How the network called a part.

    Attributes:
        args: What the part takes beside a map.
        kwargs: Likewise.
        states: Random states, one a slice.
        gap: What was computed in front of it, outside of submodules.
        sizes: What it returned behind a tensor.
    """

    args: tuple
    kwargs: dict[str, Any]
    states: tuple[RandomState, ...]
    gap: Between | None
    sizes: tuple


class SecondRun:
    """Runs the parts of a module for the network, then again with a graph.

    The second run repeats the first one exactly: it draws the same random numbers,
    normalises by the statistics of the same batch, and updates no running statistics.

    Args:
        model: The whole network.
        module: One of its modules.
        micro_batch_size: Images that run through a part at a time; None for all.

    Attributes:
        parts: Names of the parts that run again, in order. Those in front of the
            first trainable one do not, and neither do those in front of parameters
            that belong to no part, such as a position embedding.
        ends: Names of the parts whose outputs the network or a head needs.
        size: Images that run through a part at a time; None for all.
        x: What entered the first of ``parts`` in the first run ``(N, ...)``, or what
            the module before it returned if there is a gap in between.
    """

    def __init__(
        self, model: nn.Module, module: LocalModule, micro_batch_size: int | None
    ) -> None:
        self.module = module
        self.parts = trainable_parts(model, module)
        self.ends = [name for name in outlets(module) if name in self.parts]
        self.size = micro_batch_size
        self.x: Tensor | None = None
        self._version = 0
        self._gap: Between | None = None
        self._submodules = [model.get_submodule(part) for part in self.parts]
        self._calls: list[_Call] = []

    @property
    def slices(self) -> list[slice]:
        """The images that run together, once the first run has begun."""
        count = len(self.x)
        return slices_of(count, self.size or count)

    def enter(self, gap: Between | None, x: Tensor) -> None:
        """Notes what the next part takes, before it runs for the first time.

        Args:
            gap: What was computed in front of it, outside of submodules.
            x: Its input ``(N, ...)``, as the network hands it over.
        """
        if not self._calls:
            entered = x if gap is None else gap.source
            self.x, self._version = entered.detach(), entered._version
        if gap is not None:
            gap.source = None
        self._gap = gap

    def first(self, forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the next part without a graph.

        Args:
            forward: The part's forward function.
            x: Its input ``(N, ...)``, as the part's hooks hand it on.
            *args: What else the network hands to it.
            **kwargs: Likewise.
        """
        states, whole = [], {}
        with torch.no_grad():
            for images in self.slices:
                states.append(RandomState.of(x))
                if self.size is None:
                    whole['output'] = forward(x, *args, **kwargs)
                else:
                    output = forward(x[images], *args, **kwargs)
                    write_slices(whole, {'output': output}, images, len(x))
        sizes = sizes_of(whole['output'])
        gap, self._gap = self._gap, None
        self._calls.append(_Call(args, kwargs, tuple(states), gap, sizes))
        return whole['output']

    def has_gap(self, part: str) -> bool:
        """Whether the network may compute something in front of a part."""
        return any(unit.gaps and part in unit.parts for unit in self.module.units)

    def as_map(self, end: str, output: Tensor) -> Tensor:
        """The output of one of `ends` as a map ``(N, C, H, W)``."""
        unit = next(unit for unit in self.module.units if unit.name == end)
        call = self._calls[self.parts.index(end)]
        return unit.map_of(output, (output, *call.args, *call.sizes))

    def again(self, index: int, x: Tensor) -> dict[str, Tensor]:
        """Runs all parts with a graph.

        Args:
            index: Number of the slice.
            x: Its images of `x`.

        Returns:
            The outputs of `ends`, by name.

        Raises:
            RuntimeError: If what entered the module was changed in place since.
        """
        if self.x._version != self._version:
            raise RuntimeError(
                f'What enters {self.parts[0]!r} was changed in place after it had '
                'run, so that it cannot run again: make that operation out of place, '
                'or move the cut.'
            )
        outputs = {}
        with random_state_kept(x), statistics_kept(*self._submodules):
            parts = zip(self.parts, self._submodules, self._calls, strict=True)
            for name, submodule, call in parts:
                call.states[index].restore()
                x = x if call.gap is None else call.gap.again(x)
                x = submodule(x, *call.args, **call.kwargs)
                x = tensor_of(x)
                if name in self.ends:
                    outputs[name] = x
        return outputs


def trainable_parts(model: nn.Module, module: LocalModule) -> list[str]:
    """Parts of a module from the first trainable one on.

    Args:
        model: The whole network.
        module: One of its modules.
    """
    if module.index > 0:
        return module.parts
    first = module.units[0]
    if first.params:
        return module.parts[len(first.parts) - 1 :]
    skipped = 0
    for index, part in enumerate(module.parts):
        params = list(model.get_submodule(part).parameters())
        if any(param.requires_grad for param in params):
            break
        skipped = index + 1 if params or skipped else 0
    return module.parts[skipped:]
