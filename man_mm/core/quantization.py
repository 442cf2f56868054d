"""Tensors as 8-bit or 4-bit integers, rounded stochastically in groups."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 256  # values that share an offset and a step
# Values at a time: temporaries stay in the cache of each core, and PyTorch gives a
# thread no fewer. A GPU has a price for each call.
_CHUNK = 2**15
_CHUNK_ELSEWHERE = 2**22
# Steps are bfloat16, of 8 bits: rounded, they still reach the highest value.
_MARGIN = 1 + 2**-7
_ABOVE_ZERO = 2**-10  # of a step
_TINY = torch.finfo(torch.float32).tiny


@dataclass(eq=False)
class Codes:
    """Integers, and what they stand for in each group.

    That is ``low + step * (code - 1)``. In groups with a positive ``low``, code 0 is 0.

    Attributes:
        codes: Bytes ``(groups, 256)``, or ``(groups, 128)`` with two values each.
        low: Value of code 1 ``(groups, 1)``.
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
        seed: Seed of the numbers.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        size = 2 * chunk_size(device)
        self._table = torch.rand(size, device=device, generator=generator)
        self._random = random.Random(seed)

    def take(self, count: int) -> Tensor:
        """Numbers from 0 to 1, excluding 1 ``(count,)``; at most half the table."""
        start = self._random.randrange(len(self._table) // 2)
        return self._table[start : start + count]


def chunk_size(device: torch.device) -> int:
    """Values that `quantize` and `dequantize` treat at a time on a device."""
    if device.type == 'cpu':
        return _CHUNK * torch.get_num_threads()
    return _CHUNK_ELSEWHERE


def quantize(values: Tensor, bits: int, noise: Noise) -> Codes:
    """Rounds each value to one of its two neighbours among those of its group.

    Which one is drawn such that the expectation is the value itself. In groups without
    negative values, zeros stay zeros, and nothing else becomes one.

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
    count, steps = len(values), 2**bits - 2
    groups = -(-count // _GROUP)
    out = Codes(
        values.new_empty(groups, _GROUP * bits // 8, dtype=torch.uint8),
        values.new_empty(groups, 1, dtype=torch.float32),
        values.new_empty(groups, 1, dtype=torch.bfloat16),
        count,
        values.dtype,
    )
    chunk = chunk_size(values.device)
    for start in range(0, count, chunk):
        some = values[start : start + chunk]
        if missing := -len(some) % _GROUP:
            some = torch.cat((some, some[-1:].expand(missing)))
        some = some.view(-1, _GROUP)
        first = start // _GROUP
        rows = slice(first, first + len(some))
        # `aminmax` takes six times as long on a CPU.
        low, high = (f(1, keepdim=True).float() for f in (some.amin, some.amax))
        out.step[rows] = (high - low) * (_MARGIN / steps)
        step = out.step[rows].float()
        # Next to zeros, code 1 is for what is just above.
        out.low[rows] = low = torch.where(low == 0, step * _ABOVE_ZERO, low)
        # A group of zeros has no step, and 0 * inf would be no number.
        inverse = step.reciprocal().masked_fill_(step < _TINY, 0)
        code = torch.addcmul(1 - low * inverse, some, inverse)
        code += noise.take(code.numel()).view_as(code)
        code = code.clamp_(1, steps + 1).to(torch.uint8).mul_(some > _bound(low))
        if bits == 4:
            front, back = code.split(_GROUP // 2, dim=1)
            code = back.mul(16).add_(front)
        out.codes[rows] = code
    return out


def dequantize(codes: Codes) -> Tensor:
    """The values that codes stand for ``(count,)``.

    Args:
        codes: From `quantize`.
    """
    groups, width = codes.codes.shape
    values = codes.low.new_empty(groups, _GROUP, dtype=codes.dtype)
    rows = max(1, chunk_size(values.device) // _GROUP)
    for start in range(0, groups, rows):
        some = slice(start, start + rows)
        code = codes.codes[some]
        if width < _GROUP:
            code = torch.cat((code & 15, code >> 4), dim=1)
        low, step = codes.low[some], codes.step[some].float()
        value = torch.addcmul(low - step, code.float(), step)
        values[some] = torch.maximum(value, _bound(low), out=value)
    return values.view(-1)[: codes.count]


def _bound(low: Tensor) -> Tensor:
    """What the values of groups are not below ``(groups, 1)``."""
    return torch.where(low > 0, 0.0, -torch.inf)
