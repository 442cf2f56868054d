"""The layers that light auxiliary heads are made of."""

from __future__ import annotations

import math

from torch import nn


def conv_block(
    in_channels: int, channels: int, kernel: int, stride: int = 1, norm: str = 'GN'
) -> nn.Sequential:
    """Convolution, norm and ReLU.

    GroupNorm by default: local heads must not depend on how many images a GPU holds.
    Its groups: see `num_groups`.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel: Odd size of the kernel; padding keeps the size of the map.
        stride: Stride. Defaults to 1.
        norm: ``'GN'`` or ``'BN'``. Defaults to ``'GN'``.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        _norm(norm, channels),
        nn.ReLU(inplace=True),
    )


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == 'BN':
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(num_groups(channels), channels)


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: 8, or fewer, such that each has at least four channels.

    On maps of one location, which the coarsest ones are, fewer channels would have
    hardly any variance, and one channel none: nothing would pass.
    """
    return math.gcd(channels, min(8, max(channels // 4, 1)))
