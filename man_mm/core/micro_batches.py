"""A module that runs on slices of its batch, between boundaries that stay whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .partition import LocalModule, Unit
from .patches import Forward

Maps = dict[str, Tensor]
Chain = Callable[[Tensor], Maps]


class MicroBatches:
    """Runs a chain of submodules when the network calls the first of them.

    The others then hand on what they get, and the outlets what the chain has put
    together, so the network's own forward function never notices. A part that the
    network uses again after the last one, such as an activation, runs as usual.

    Args:
        parts: Names of submodules; each takes the output of the one before it.
        ends: Names of the parts whose outputs the network or a head needs, the last
            part included.
        run: Called with the chain and its input ``(N, ...)`` when the network
            arrives; returns the whole outputs of ``ends`` by name.
    """

    def __init__(
        self,
        parts: Sequence[str],
        ends: Sequence[str],
        run: Callable[[Chain, Tensor], Maps],
    ) -> None:
        self.parts = tuple(parts)
        self._ends = frozenset(ends)
        self._run = run
        self._forwards: dict[str, Forward] = {}
        self._outputs: Maps = {}
        self._awaited = 0

    def wrap(self, name: str, forward: Forward) -> Forward:
        """The forward function of a part during a step."""
        self._forwards[name] = forward
        return partial(self._call, name)

    def chain(self, x: Tensor) -> Maps:
        """Runs all parts on some images, and returns the outputs of the ends."""
        outputs = {}
        for name in self.parts:
            x = self._forwards[name](x)
            if name in self._ends:
                outputs[name] = x
        return outputs

    def _call(self, name: str, x: Tensor) -> Tensor:
        if name != self.parts[self._awaited]:
            return self._forwards[name](x)
        if self._awaited == 0:
            self._outputs = self._run(self.chain, x)
        self._awaited = (self._awaited + 1) % len(self.parts)
        return self._outputs.pop(name, x)


def check_maps(units: Sequence[Unit], user: str, fix: str) -> None:
    """Refuses units whose parts `MicroBatches` cannot run or replace.

    Args:
        units: All units of a network.
        user: What needs them, for the message.
        fix: What to do instead.

    Raises:
        ValueError: If units take or return something else than one map.
    """
    if any(unit.as_map for unit in units):
        raise ValueError(
            f'{user} needs units that take nothing but a map, and {units[0].name!r} '
            f'takes more: {fix}.'
        )


def check_size(size: int, modules: Sequence[LocalModule]) -> None:
    """Refuses a size of micro-batches that is none, or units that take no slices.

    Args:
        size: Images that run at a time.
        modules: All modules of a network.

    Raises:
        ValueError: If it is less than 1, or units are not for `MicroBatches`.
    """
    if size < 1:
        raise ValueError(f'micro_batch_size must be at least 1 image, got {size}.')
    units = [unit for module in modules for unit in module.units]
    check_maps(units, 'micro_batch_size', 'remove micro_batch_size')


def slices_of(count: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``count`` images."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def write_slices(whole: Maps, maps: Maps, images: slice, count: int) -> None:
    """Copies maps of some images, detached, into maps ``(count, ...)`` of all."""
    for name, map_ in maps.items():
        if name not in whole:
            whole[name] = map_.new_empty(count, *map_.shape[1:])
        whole[name][images] = map_.detach()


def join_slices(maps: Sequence[Maps]) -> Maps:
    """Joins maps of slices to maps of the batch, with their graph."""
    return {name: torch.cat([part[name] for part in maps]) for name in maps[0]}


def slice_batch(targets: Any, images: slice, count: int) -> Any:
    """The targets of some images of a batch.

    Args:
        targets: None, or what has one entry an image: a tensor ``(N, ...)``, a list, a
            data sample of several images; or a dictionary of these.
        images: Which images.
        count: Number of images N in the batch.

    Raises:
        ValueError: If the targets do not have N entries.
    """
    if targets is None:
        return None
    if isinstance(targets, dict):
        return {
            key: slice_batch(value, images, count) for key, value in targets.items()
        }
    if hasattr(targets, 'stack') and len(targets) == count:
        # A data sample of mmagic, which has no index.
        return targets.stack(targets.split(allow_nonseq_value=True)[images])
    if not hasattr(targets, '__getitem__') or len(targets) != count:
        raise ValueError(
            f'micro_batch_size cannot slice targets of type {type(targets).__name__}: '
            f'they need one entry for each of the {count} images.'
        )
    return targets[images]
