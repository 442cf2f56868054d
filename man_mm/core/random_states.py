"""States of the random number generators that a forward pass may draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class RandomState:
    """State of the generators of the CPU and of the device of a tensor.

    Attributes:
        cpu: State of the CPU's generator.
        devices: Indices of other devices.
        states: States of their generators.
        device_type: Their type.
    """

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str

    @classmethod
    def of(cls, tensor: Tensor) -> RandomState:
        """The present state, for operations on a tensor."""
        devices, states = get_device_states(tensor)
        return cls(torch.get_rng_state(), devices, states, tensor.device.type)

    def restore(self) -> None:
        """Makes it the present state."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)


@contextmanager
def random_state_kept(tensor: Tensor) -> Iterator[None]:
    """What runs inside leaves the generators for a tensor's device as they were."""
    before = RandomState.of(tensor)
    try:
        yield
    finally:
        before.restore()
