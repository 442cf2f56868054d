"""Tensors of any shape from one process to the next, without waiting for it."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

Packet = Mapping[str, Mapping[str, Tensor]]

_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Channel:
    """Sends packets to the next rank and receives those of the rank before.

    A packet is a dictionary of dictionaries of tensors. Shapes and names may differ
    from packet to packet; a tensor that is in it twice travels once. Strides are kept,
    since kernels choose their order of summation by them.

    Args:
        device: Where tensors live; one that the group's backend can send.
        group: Process group. Defaults to the default group.
        in_flight: Packets that may be under way before `send` waits.

    Attributes:
        sent_bytes: Bytes of the latest packet that was sent.

    Raises:
        ValueError: If ``in_flight`` is less than 1.
    """

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        in_flight: int = 2,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f'in_flight must be at least 1 batch, got {in_flight}.')
        self.in_flight = in_flight
        self.sent_bytes = 0
        self._device = device
        self._group = group
        self._rank = dist.get_rank(group)
        self._under_way: deque[list[tuple[dist.Work, Tensor]]] = deque()

    def send(self, packet: Packet) -> None:
        """Starts sending; waits for an earlier packet if too many are under way.

        Args:
            packet: Tensors, which nobody may change until they have arrived.

        Raises:
            RuntimeError: If the next rank is gone, or does not receive in the time
                that the process group allows.
        """
        self._wait(self.in_flight - 1)
        tensors: dict[tuple, Tensor] = {}
        layout = []
        for section, content in packet.items():
            for name, tensor in content.items():
                tensor = _dense(tensor)
                key = (tensor.data_ptr(), *_spec(tensor))
                tensors.setdefault(key, tensor)
                layout.append((section, name, list(tensors).index(key)))
        specs = [_spec(tensor) for tensor in tensors.values()]
        header = pickle.dumps((tuple(packet), layout, specs))
        messages = [
            torch.tensor([len(header)], device=self._device),
            torch.frombuffer(bytearray(header), dtype=torch.uint8).to(self._device),
            *(_bytes(tensor) for tensor in tensors.values()),
        ]
        self.sent_bytes = sum(message.nbytes for message in messages)
        try:
            works = [
                (dist.isend(m, group=self._group, group_dst=self._rank + 1), m)
                for m in messages
            ]
        except RuntimeError as error:
            self._explain(self._rank + 1, 'take', error)
        self._under_way.append(works)

    def receive(self) -> dict[str, dict[str, Tensor]]:
        """The next packet.

        Raises:
            RuntimeError: If the rank before is gone, or sends nothing in the time that
                the process group allows.
        """
        try:
            size = self._take((1,), torch.int64)
            header = self._take((int(size),), torch.uint8)
            sections, layout, specs = pickle.loads(header.cpu().numpy().tobytes())
            tensors = [self._take_like(spec) for spec in specs]
        except RuntimeError as error:
            self._explain(self._rank - 1, 'send', error)
        packet: dict[str, dict[str, Tensor]] = {section: {} for section in sections}
        for section, name, index in layout:
            packet[section][name] = tensors[index]
        return packet

    def flush(self) -> None:
        """Waits until everything that was sent has arrived.

        Raises:
            RuntimeError: As `send`.
        """
        self._wait(0)

    def _wait(self, left: int) -> None:
        try:
            while len(self._under_way) > left:
                for work, _ in self._under_way.popleft():
                    work.wait()
        except RuntimeError as error:
            self._explain(self._rank + 1, 'take', error)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, group=self._group, group_src=self._rank - 1)
        return tensor

    def _take_like(self, spec: _Spec) -> Tensor:
        shape, stride, dtype = spec
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self._device)
        dist.recv(_bytes(tensor), group=self._group, group_src=self._rank - 1)
        return tensor

    def _explain(self, rank: int, verb: str, error: RuntimeError) -> NoReturn:
        raise RuntimeError(
            f'Rank {rank} did not {verb} the maps of a batch: it has ended, or needed '
            'longer than the timeout of the process group. See its own output, or '
            f'raise the timeout in init_process_group. ({error})'
        ) from error


def _spec(tensor: Tensor) -> _Spec:
    return tensor.shape, tensor.stride(), tensor.dtype


def _dense(tensor: Tensor) -> Tensor:
    """The tensor if its elements fill its memory, in any order, otherwise a copy."""
    tensor = tensor.detach()
    fills = torch.empty_like(tensor, device='meta').stride() == tensor.stride()
    return tensor if fills else tensor.clone()


def _bytes(tensor: Tensor) -> Tensor:
    """A view of the memory of a dense tensor, ``(bytes,)``; all backends send it."""
    flat: Any = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)
