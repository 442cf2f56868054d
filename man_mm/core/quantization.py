"""Tensors as 8-bit or 4-bit integers, rounded stochastically in groups."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_GROUP = 256  # values that share an offset and a step
# Values at a time: temporaries stay in the cache of each core, and few calls are made.
# A GPU has a higher price for each call.
_CHUNK = 2**17
_CHUNK_ELSEWHERE = 2**22
_PLACES = 2**16  # where a table of random numbers may be read
# Steps are bfloat16, of 8 bits: rounded, they still reach the highest value.
_MARGIN = 1 + 2**-7
_ABOVE_LOW = 2**-10  # of a step
_TINY = torch.finfo(torch.float32).tiny


@dataclass(eq=False)
class Codes:
    """Integers, and what they stand for in each group.

    That is ``low`` for code 0, and just above ``low + step * (code - 1)`` for others.

    Attributes:
        codes: Bytes ``(groups, 256)``, or ``(groups, 128)`` with two values each.
        low: Lowest value of each group ``(groups, 1)``.
        step: Distance of values ``(groups, 1)``.
        count: Number of values; the last group may have fewer.
        dtype: Of the values.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    count: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of what they need to be read."""
        return sum(x.nbytes for x in (self.codes, self.low, self.step))


class Noise:
    """Uniform random numbers for rounding, from a table that is read anywhere.

    Making a new number for each value would take longer than all the rest.

    Args:
        device: Where the numbers are.
        seed: See `restart`.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(0)
        size = chunk_size(device) + _PLACES
        self._table = torch.rand(size, device=device, generator=generator) + 1
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """The places where the table is read from here on depend on `seed` alone."""
        self._random = random.Random(seed)

    def take(self, count: int) -> Tensor:
        """Numbers from 1 to 2, excluding 2 ``(count,)``; at most a chunk."""
        start = self._random.randrange(_PLACES)
        return self._table[start : start + count]


def chunk_size(device: torch.device) -> int:
    """Values that `quantize` and `dequantize` treat at a time on a device."""
    if device.type == 'cpu':
        return _CHUNK * torch.get_num_threads()
    return _CHUNK_ELSEWHERE


def quantize(values: Tensor, bits: int, noise: Noise) -> Codes:
    """Rounds each value to one of its two neighbours among those of its group.

    Which one is drawn such that the expectation is the value itself. The lowest value
    of a group stays as it is, and nothing else becomes it: so do the zeros of a ReLU.

    Args:
        values: Floating-point values ``(count,)``; if one is not finite, neither is
            what its group will be.
        bits: 8 or 4.
        noise: Random numbers.

    Examples:
        >>> import torch
        >>> from man_mm.core.quantization import Noise, dequantize, quantize
        >>> values = torch.linspace(0, 1, 1000)
        >>> codes = quantize(values, 8, Noise(values.device, seed=0))
        >>> codes.nbytes  # of 4000
        1048
        >>> float((dequantize(codes) - values).abs().max()) < 1 / 250
        True
    """
    count = len(values)
    groups = -(-count // _GROUP)
    out = Codes(
        values.new_empty(groups, _GROUP * bits // 8, dtype=torch.uint8),
        values.new_empty(groups, 1, dtype=torch.float32),
        values.new_empty(groups, 1, dtype=torch.bfloat16),
        count,
        values.dtype,
    )
    whole = count // _GROUP
    _quantize_groups(values[: whole * _GROUP].view(whole, _GROUP), out, 0, noise)
    if whole < groups:
        rest = values[whole * _GROUP :]
        rest = torch.cat((rest, rest[-1:].expand(_GROUP - len(rest))))
        _quantize_groups(rest.view(1, _GROUP), out, whole, noise)
    return out


def dequantize(codes: Codes) -> Tensor:
    """The values that codes stand for ``(count,)``.

    Args:
        codes: From `quantize`.
    """
    groups, width = codes.codes.shape
    values = codes.low.new_empty(groups, _GROUP, dtype=codes.dtype)
    step = codes.step.float()
    below = codes.low - step * (1 - _ABOVE_LOW)
    for some in _chunks(groups, values.device):
        code = codes.codes[some]
        if width < _GROUP:
            code = torch.cat((code & 15, code >> 4), dim=1)
        # In place where it can be: fresh memory takes longer than all the rest.
        is_exact = codes.dtype == torch.float32
        value = values[some].copy_(code) if is_exact else code.float()
        value.mul_(step[some]).add_(below[some])
        torch.maximum(value, codes.low[some], out=value)
        if not is_exact:
            values[some] = value
    return values.view(-1)[: codes.count]


def _quantize_groups(values: Tensor, out: Codes, first: int, noise: Noise) -> None:
    """Writes the codes of whole groups ``(groups, 256)``, the first at row `first`."""
    is_packed = out.codes.shape[1] < _GROUP
    steps = (2**4 if is_packed else 2**8) - 2
    rows = slice(first, first + len(values))
    # `aminmax` takes many times as long on a CPU.
    low, high = (f(1, keepdim=True).float() for f in (values.amin, values.amax))
    out.low[rows] = low
    out.step[rows] = (high - low) * (_MARGIN / steps)
    step = out.step[rows].float()
    # A group of equal values has no step, and 0 * inf would be no number.
    inverse = step.reciprocal().masked_fill_(step < _TINY, 0)
    size = min(len(values), chunk_size(values.device) // _GROUP)
    scaled = low.new_empty(size, _GROUP)
    # A float becomes a byte far sooner by way of 16 bits.
    short = torch.empty_like(scaled, dtype=torch.int16)
    for some in _chunks(len(values), values.device):
        group = values[some]
        value, code = scaled[: len(group)], short[: len(group)]
        torch.sub(group, low[some], out=value).mul_(inverse[some])
        # What is not above the lowest value ends below 1, which is code 0.
        functional.threshold_(value, 0, -1.5)
        value += noise.take(value.numel()).view_as(value)
        code.copy_(value)
        if is_packed:
            front, back = code.split(_GROUP // 2, dim=1)
            code = back.mul_(16).add_(front)
        out.codes[rows][some] = code


def _chunks(groups: int, device: torch.device) -> Iterator[slice]:
    """Groups that are treated at a time."""
    size = chunk_size(device) // _GROUP
    for start in range(0, groups, size):
        yield slice(start, start + size)
