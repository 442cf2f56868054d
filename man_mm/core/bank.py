"""The memory bank: what auxiliary heads may read of other modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .observer import Observer
from .storages import tensor_bytes


def _observed(method: Callable[..., None]) -> Callable[..., None]:
    """Lets the observer of a bank see a method that changes its maps."""

    @wraps(method)
    def call(self: MemoryBank, *args: Any, **kwargs: Any) -> None:
        if self.observer is None:
            return method(self, *args, **kwargs)
        with self.observer.bank_changes(self._maps):
            method(self, *args, **kwargs)

    return call


class MemoryBank(Mapping[str, Tensor]):
    """Feature maps of earlier modules, and running statistics that outlive a batch.

    *Batch memory* holds detached maps of the current step, keyed by the name of the
    unit that made them; it is a read-only mapping. *Long-term memory* keeps the
    running mean and variance of every channel of every map: two vectors ``(C,)`` a
    map, whatever the batch or the data set. After arXiv 2406.00446, section 3.

    Attributes:
        shared: What else the heads of one step share, such as target assignments;
            emptied with the batch memory.
        observer: Sees every change of the maps, if there is one. Defaults to None.

    Args:
        long_term: Whether to keep long-term memory. Defaults to True.
        momentum: Share of the old value in each update of the long-term memory, in
            [0, 1). The first updates are plain averages, so there is no start-up
            bias. Defaults to 0.99.

    Raises:
        ValueError: If ``momentum`` is outside [0, 1).

    Examples:
        >>> import torch
        >>> from man_mm import MemoryBank
        >>> bank = MemoryBank()
        >>> bank.store('layer1', torch.ones(2, 3, 4, 4))
        >>> bank['layer1'].shape
        torch.Size([2, 3, 4, 4])
        >>> bank.clear()  # at the end of a step
        >>> len(bank)
        0
        >>> mean, variance = bank.statistics('layer1')
        >>> mean
        tensor([1., 1., 1.])
    """

    def __init__(self, long_term: bool = True, momentum: float = 0.99) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
        self.long_term = long_term
        self.momentum = momentum
        self.shared: dict[Any, Any] = {}
        self.observer: Observer | None = None
        self._maps: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._moments: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}
        self._pending: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        map_ = self._maps[name]
        if map_._version != self._versions[name]:
            raise RuntimeError(
                f'The map {name!r} in the memory bank was changed in place after it '
                'was stored: make the operation that follows the cut out of place.'
            )
        return map_

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    @_observed
    def store(self, name: str, map_: Tensor, average: bool = False) -> None:
        """Stores a map for the rest of the step.

        Args:
            name: Name of the unit that made the map.
            map_: Feature map ``(N, C, H, W)``; kept detached, without a copy.
            average: Keep its averages ``(N, C, 1, 1)`` only. Defaults to False.
        """
        map_ = map_.detach()
        if self.long_term:
            self._pending[name] = _moments(map_)
        self._maps[name] = map_.mean((2, 3), keepdim=True) if average else map_
        self._versions[name] = self._maps[name]._version

    @_observed
    def receive(self, name: str, map_: Tensor, moments: Tensor | None) -> None:
        """Stores a map that another process has made.

        Args:
            name: Name of the unit that made the map.
            map_: Feature map ``(N, C, H, W)``, or its averages ``(N, C, 1, 1)``.
            moments: What `pending` returns for it there, ``(2, C)`` or None.
        """
        if moments is not None:
            self._pending[name] = moments
        self._maps[name] = map_
        self._versions[name] = map_._version

    def pending(self, name: str) -> Tensor | None:
        """What `clear` will add to the long-term memory for a map.

        Args:
            name: Name of the unit that made the map.

        Returns:
            Mean and mean square of every channel, ``(2, C)``; None if nothing.
        """
        return self._pending.get(name)

    @_observed
    def keep(self, names: Collection[str]) -> None:
        """Forgets all maps except those named; the statistics of all are kept.

        Args:
            names: Names of the units whose maps stay.
        """
        for name in set(self._maps).difference(names):
            del self._maps[name], self._versions[name]

    @_observed
    def clear(self) -> None:
        """Forgets the batch memory, after adding it to the long-term memory.

        Heads thus read statistics of earlier steps only, which are equal on all ranks.
        """
        for name, moments in self._pending.items():
            self._remember(name, moments)
        self._pending.clear()
        self.shared.clear()
        self._maps.clear()
        self._versions.clear()

    def statistics(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance of every channel of a map, over earlier steps.

        Args:
            name: Name of the unit that makes the map.

        Returns:
            Two vectors ``(C,)``, or None before the end of the first step.
        """
        if name not in self._moments:
            return None
        mean, square = self._moments[name]
        return mean, (square - mean**2).clamp(min=0)

    @property
    def nbytes(self) -> int:
        """Bytes of both memories; maps that share a storage count once."""
        return tensor_bytes([self._maps, self._moments, self._pending])

    def moments(self) -> list[Tensor]:
        """The long-term tensors ``(2, C)``, in the order of their names.

        They are the live tensors, so that ranks can average them in place.
        """
        return [self._moments[name] for name in sorted(self._moments)]

    def state_dict(self) -> dict[str, Any]:
        """Long-term memory; batch memory never outlives its step."""
        return {'moments': dict(self._moments), 'updates': dict(self._updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the long-term memory.

        Args:
            state: What `state_dict` returned.
        """
        self._moments = {k: v.clone() for k, v in state['moments'].items()}
        self._updates = dict(state['updates'])

    def _remember(self, name: str, new: Tensor) -> None:
        seen = self._updates.get(name, 0)
        # Mean 0 and variance 1 standardise nothing.
        empty = torch.stack([torch.zeros_like(new[0]), torch.ones_like(new[1])])
        old = self._moments[name].to(new) if seen else empty
        # A new tensor, not an in-place update: graphs may have saved the old one.
        moments = torch.lerp(new, old, min(self.momentum, seen / (seen + 1)))
        # One bad batch must not poison what outlives it.
        self._moments[name] = torch.where(new.isfinite().all(), moments, old)
        self._updates[name] = seen + 1


@torch.no_grad()
def _moments(map_: Tensor) -> Tensor:
    """Mean and mean square of every channel, ``(2, C)`` in float32."""
    variance, mean = torch.var_mean(map_.float(), dim=(0, 2, 3), correction=0)
    return torch.stack([mean, variance + mean**2])
