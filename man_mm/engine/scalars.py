"""Scalars for the log that stay on their device until somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor

# Ranks that print nothing do not look; what waits must not grow without end.
_MOST_WAITING = 1000


class ScalarLog:
    """Writes tensors to a ``MessageHub`` without reading them.

    ``MessageHub.update_scalar`` reads a tensor at once, for which the host waits. Here
    they are read together, when a logger, a checkpoint or anybody else asks for one of
    their histories.

    Args:
        hub: The message hub of the run.
    """

    def __init__(self, hub: MessageHub) -> None:
        self._hub = hub
        self._waiting: list[tuple[list[str], Tensor]] = []

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Adds the scalars of an iteration.

        Args:
            scalars: Scalar tensors of one device, by their names in the log.
        """
        if not scalars:
            return
        for name in scalars:
            self._watch(name)
        values = torch.stack([value.detach() for value in scalars.values()])
        self._waiting.append((list(scalars), values))
        if len(self._waiting) >= _MOST_WAITING:
            self._read()

    def _watch(self, name: str) -> None:
        buffer = self._hub.log_scalars.get(name)
        if buffer is None:
            self._hub.update_scalar(name, 0.0)  # tells the hub to save it
            buffer = HistoryBuffer()
        if isinstance(buffer, _Buffer):
            if buffer.read == self._read:
                return
            # That of another log, such as one of an earlier run in this process.
            buffer.read()
            buffer = buffer.known
        self._hub.log_scalars[name] = _Buffer(buffer, self._read)

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        names = [name for some, _ in waiting for name in some]
        values = torch.cat([values for _, values in waiting]).tolist()
        histories: dict[str, list[float]] = {}
        for name, value in zip(names, values, strict=True):
            histories.setdefault(name, []).append(value)
        for name, history in histories.items():
            self._hub.log_scalars[name].extend(history)


class _Buffer(HistoryBuffer):
    """A history that is completed when it is looked at; saved as a plain one."""

    def __init__(self, known: HistoryBuffer, read: Callable[[], None]) -> None:
        self.known = known
        self.read = read
        self.max_length = known.max_length

    @property
    def _log_history(self) -> np.ndarray:
        self.read()
        return self.known._log_history

    @_log_history.setter
    def _log_history(self, values: np.ndarray) -> None:
        self.known._log_history = values

    @property
    def _count_history(self) -> np.ndarray:
        self.read()
        return self.known._count_history

    @_count_history.setter
    def _count_history(self, counts: np.ndarray) -> None:
        self.known._count_history = counts

    def extend(self, values: list[float]) -> None:
        known, kept = self.known, slice(-self.max_length, None)
        known._log_history = np.append(known._log_history, values)[kept]
        ones = np.ones(len(values), dtype=int)
        known._count_history = np.append(known._count_history, ones)[kept]

    def __reduce__(self) -> Any:
        self.read()
        known = self.known
        arguments = known._log_history, known._count_history, known.max_length
        return HistoryBuffer, arguments
