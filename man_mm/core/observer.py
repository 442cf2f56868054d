"""What a learner and its memory bank tell those who watch a training step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from .partition import LocalModule


class Observer(Protocol):
    """Is told what happens in a training step, in order to measure it.

    A learner and a bank have one each, as their attribute ``observer``; it must leave
    alone what it is given. What a module computes, hooks on its submodules show.

    Example:
        >>> import contextlib
        >>> import torch
        >>> from man_mm.core import MemoryBank
        >>> class Printer:
        ...     @contextlib.contextmanager
        ...     def bank_changes(self, maps):
        ...         yield
        ...         print({name: tuple(maps[name].shape) for name in maps})
        >>> bank = MemoryBank()
        >>> bank.observer = Printer()
        >>> bank.store('stem', torch.ones(2, 3, 8, 8))
        {'stem': (2, 3, 8, 8)}
        >>> bank.clear()
        {}
    """

    def passed_on(self, module: LocalModule, maps: Mapping[str, Tensor]) -> None:
        """A module has ended: what necks, later modules and heads read is handed on.

        In an exact step, it has only run forward, and each map is told as it is made.

        Args:
            module: The module.
            maps: Maps ``(N, C, H, W)`` of it by unit name; that of ``module.cut``, if
                it is there, is the boundary.
        """

    def bank_changes(self, maps: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The bank is about to change its maps; the context ends when it has.

        Args:
            maps: What the bank holds by unit name, before and after the change.
        """
