"""Activations that wait for their backward pass in 8 or 4 bits a value."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .quantization import Codes, Noise, dequantize, quantize

# What is smaller costs more time than it saves memory.
_SMALLEST = 2**13
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CompressedActivations:
    """Keeps what autograd saves for the backward pass as 8-bit or 4-bit integers.

    Floating-point values are rounded stochastically in groups of 256 (ActNN, arXiv
    2104.14129), so that weights get their gradients plus noise. A storage is
    compressed once, however many operations save it. Zeros of a ReLU stay zeros, and
    nothing else becomes one: it passes on the same gradients as without.

    Weights, small tensors, integers, and what is saved inside `uncompressed` or in a
    checkpointed region stay as they are. What is still there in the backward pass for
    another reason, such as a boundary, is read instead of its codes.

    Args:
        bits: Bits a value, 8 or 4.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from man_mm.core import CompressedActivations
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
        >>> with CompressedActivations(bits=8).saving():
        ...     loss = model(torch.rand(2, 3, 32, 32)).mean()
        >>> loss.backward()
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._seed = 0
        self._noise: dict[torch.device, Noise] = {}
        self._known: dict[int, _Known] = {}
        self._latest: tuple[_Shared, Tensor] | None = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What runs inside saves its activations in few bits.

        Backward passes may run inside, or later.
        """
        # torch's generator decides, so that a resumed training goes on as before.
        self._seed = int(torch.randint(2**31, ()))
        for noise in self._noise.values():
            noise.restart(self._seed)
        self._latest = None
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._known.clear()

    def _pack(self, tensor: Tensor) -> _Saved | _Kept:
        # Autograd hands over a view, without the graph.
        origin = tensor._base if tensor._is_view() else tensor
        if not _is_large_map(tensor) or _is_weight(origin):
            return _Kept(tensor)
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        shared = known.shared(tensor) if known else None
        if shared is None:
            size = storage.nbytes() // tensor.element_size()
            flat = tensor.detach().as_strided((size,), (1,), 0)
            codes = quantize(flat, self.bits, self._noise_on(tensor.device))
            shared = _Shared(codes, weakref.ref(origin), tensor._version)
            self._known[storage._cdata] = _Known.of(tensor, shared)
        shared.readers += 1
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset())
        return _Saved(shared, layout)

    def _unpack(self, saved: _Saved | _Kept) -> Tensor:
        if isinstance(saved, _Kept):
            return saved.unpack()
        shared = saved.shared
        shared.readers -= 1
        latest, self._latest = self._latest, None
        whole = shared.alive()
        if whole is None and latest is not None and latest[0] is shared:
            whole = latest[1]
        del latest  # before another one is made
        if whole is None:
            whole = dequantize(shared.codes)
        if shared.readers > 0:  # the operation that reads it next may be the next one
            self._latest = shared, whole
        return whole.as_strided(*saved.layout)

    def drop_needless_codes(self) -> None:
        """Frees the codes of what something else keeps: a boundary, for instance.

        To be called just before a backward pass, which ends before the network goes on.
        """
        for known in self._known.values():
            if (shared := known.ref()) is not None:
                shared.settle()

    def _noise_on(self, device: torch.device) -> Noise:
        if device not in self._noise:
            self._noise[device] = Noise(device, self._seed)
        return self._noise[device]


def uncompressed() -> saved_tensors_hooks:
    """What runs inside saves its tensors as they are.

    Examples:
        >>> from man_mm.core.compressed_activations import uncompressed
        >>> with uncompressed():
        ...     pass
    """
    return saved_tensors_hooks(_Kept, _Kept.unpack)


def check_unchanged(tensor: Tensor, version: int) -> None:
    """Refuses a saved tensor that was changed in place since.

    Autograd leaves this check to those who install hooks on saved tensors.

    Args:
        tensor: What was saved.
        version: Its version then.

    Raises:
        RuntimeError: If it has another one.
    """
    if tensor._version != version:
        raise RuntimeError(
            'one of the variables needed for gradient computation has been modified '
            f'by an inplace operation: a tensor of shape {tuple(tensor.shape)} '
            f'is at version {tensor._version}; expected version {version} instead.'
        )


def _is_large_map(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype in _DTYPES
        and tensor.untyped_storage().nbytes() >= _SMALLEST * tensor.element_size()
    )


def _is_weight(origin: Tensor) -> bool:
    if type(origin.grad_fn).__name__ == 'ToCopyBackward0':  # in mixed precision
        origin = getattr(origin.grad_fn.next_functions[0][0], 'variable', origin)
    return isinstance(origin, nn.Parameter)


@dataclass(eq=False)
class _Shared:
    """Codes of a storage, for all operations that saved it."""

    codes: Codes | None
    origin: weakref.ref[Tensor]
    version: int
    readers: int = 0
    kept: Tensor | None = None

    def settle(self) -> None:
        """Drops the codes if something else keeps the tensor."""
        if (whole := self.alive()) is not None:
            self.kept, self.codes = whole, None

    def alive(self) -> Tensor | None:
        """The tensor itself, if something else kept it."""
        if self.kept is not None:
            check_unchanged(self.kept, self.version)
            return self.kept
        origin = self.origin()
        is_same = origin is not None and origin._version == self.version
        return origin.detach() if is_same else None


@dataclass(frozen=True)
class _Saved:
    """A tensor that was saved: a view of a storage."""

    shared: _Shared
    layout: tuple[Any, ...]


@dataclass(frozen=True)
class _Known:
    """A storage that was compressed, while it and its codes last."""

    storage: weakref.ref
    version: int
    dtype: torch.dtype
    ref: weakref.ref

    @classmethod
    def of(cls, tensor: Tensor, shared: _Shared) -> _Known:
        storage = weakref.ref(tensor.untyped_storage())
        return cls(storage, tensor._version, tensor.dtype, weakref.ref(shared))

    def shared(self, tensor: Tensor) -> _Shared | None:
        """The codes, if a tensor is still what they stand for."""
        is_same = (
            self.storage() is tensor.untyped_storage()
            and self.version == tensor._version
            and self.dtype == tensor.dtype
        )
        return self.ref() if is_same else None


class _Kept:
    """A tensor that was saved as it is."""

    __slots__ = ('tensor', 'version')

    def __init__(self, tensor: Tensor) -> None:
        # An output that held its own graph would never be freed.
        self.tensor, self.version = tensor.detach(), tensor._version

    def unpack(self) -> Tensor:
        check_unchanged(self.tensor, self.version)
        return self.tensor
