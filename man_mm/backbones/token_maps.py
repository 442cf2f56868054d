"""What blocks return as maps: images of channels, of tokens, or with channels last."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

_EXTRA = 2  # tokens at most that are no patch: those of classes and of distillation

AsMap = Callable[[Tensor, tuple], Tensor]


def map_kind(output: Any) -> AsMap | None:
    """How what a block returned for one square image is read as a map.

    Args:
        output: What it returned; a map ``(1, C, H, W)``, a map with channels last
            ``(1, H, W, C)``, or tokens ``(1, extra + H * W, C)``, of which up to two
            are no patches.

    Returns:
        A function from such an output and the arguments of the block to a map
        ``(N, C, H, W)`` without a copy; None if it is none of these.
    """
    if not isinstance(output, Tensor) or len(output) != 1:
        return None
    if output.dim() == 4:
        _, a, b, c = output.shape
        return channels_last_map if a == b != c else same_map
    if output.dim() != 3:
        return None
    side = math.isqrt(output.shape[1])
    extra = output.shape[1] - side**2
    is_map = side > 1 and extra <= _EXTRA
    return partial(token_map, extra=extra) if is_map else None


def same_map(map_: Tensor, _args: tuple) -> Tensor:
    """For blocks that return a map."""
    return map_


def channels_last_map(map_: Tensor, _args: tuple) -> Tensor:
    """``(N, H, W, C)`` as ``(N, C, H, W)``."""
    return map_.permute(0, 3, 1, 2)


def token_map(tokens: Tensor, args: tuple, extra: int = 0) -> Tensor:
    """``(N, extra + H * W, C)`` as ``(N, C, H, W)``.

    Args:
        tokens: Extra tokens such as the class token, and one a patch.
        args: What the block was called with; (H, W) if that is among it, as a pair or
            as two numbers. Otherwise, images have to be square.
        extra: Number of extra tokens, which come first.

    Raises:
        ValueError: If neither is the case.
    """
    patches = tokens[:, extra:] if extra else tokens
    count = patches.shape[1]
    side = math.isqrt(count)
    size = next((s for s in _sizes(args) if math.prod(s) == count), (side, side))
    if math.prod(size) != count:
        raise ValueError(
            f'{count} patches are no square, and their height and width are not handed '
            'on from block to block: train with square images.'
        )
    return patches.transpose(1, 2).unflatten(2, size)


def _sizes(args: tuple) -> list[tuple[int, int]]:
    """Pairs of numbers among the arguments of a block."""
    pairs = [arg for arg in args[1:] if isinstance(arg, tuple | list)]
    numbers = [arg for arg in args[1:] if type(arg) is int]
    return [
        (pair[0], pair[1])
        for pair in [*pairs, numbers]
        if len(pair) == 2 and all(isinstance(x, int) for x in pair)
    ]
