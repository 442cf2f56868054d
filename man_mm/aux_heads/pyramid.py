"""A small feature pyramid around a module: the light SLM of detection heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from man_mm.backbones import Tap
from man_mm.core import MemoryBank

from .blocks import conv_block


class Lateral(nn.Module):
    """1×1 convolution that standardises its input with long-term statistics.

    The statistics are folded into the weight, so they cost nothing on the map.

    Args:
        in_channels: Channels of the input map.
        channels: Channels of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1)

    def forward(
        self, map_: Tensor, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Maps ``(N, in_channels, H, W)`` to ``(N, channels, H, W)``.

        Args:
            map_: The input map.
            statistics: Mean and variance ``(in_channels,)`` to standardise with.
        """
        if statistics is None:
            return self.conv(map_)
        mean, variance = (x.to(self.conv.weight) for x in statistics)
        scale = (variance + 1e-5).rsqrt()
        weight = self.conv.weight * scale[None, :, None, None]
        return F.conv2d(map_, weight, self.conv.bias - weight.flatten(1) @ mean)


class LocalPyramid(nn.Module):
    """Feature maps of one width at every level, seen from one module.

    Finer levels come from maps of earlier stages (1×1 lateral convolutions), the
    module's own level from its output, coarser levels from an SLM, whose first
    convolution for each level is strided; a top-down path and one 3×3 convolution,
    shared by all levels, join them. After the local FPN of arXiv 2406.00446,
    section 3.3.

    Args:
        maps: Maps that are readable, the module's output last. Of several maps
            with one stride the last is taken.
        levels: Strides of the levels to return, in pixels, powers of two.
        channels: Width of every level. Defaults to 64.
        num_blocks: 3×3 convolutions of the SLM for each coarser level; with 0 there
            is no SLM, and max pooling makes these levels, as mmdet's FPN does.
            Defaults to 1.
    """

    def __init__(
        self,
        maps: Sequence[Tap],
        levels: Sequence[int],
        channels: int = 64,
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        own = maps[-1]
        self.sources = {
            tap.stride: tap
            for tap in maps
            if tap is own or min(levels) <= tap.stride < own.stride
        }
        self.own_stride = own.stride
        levels = [s for s in levels if s in self.sources or s > own.stride]
        self.levels = levels or [own.stride]
        self.laterals = nn.ModuleDict(
            {str(s): Lateral(tap.channels, channels) for s, tap in self.sources.items()}
        )
        steps = round(math.log2(max(max(self.levels) / own.stride, 1)))
        self.slm = nn.ModuleList(_halve(channels, num_blocks) for _ in range(steps))
        self.out = conv_block(channels, channels, 3)

    def forward(
        self, maps: Mapping[str, Tensor], bank: MemoryBank | None = None
    ) -> list[Tensor]:
        """Builds the levels.

        Args:
            maps: Feature maps by unit name.
            bank: Where long-term statistics of the maps are looked up.

        Returns:
            One map ``(N, channels, H, W)`` for each of ``self.levels``.
        """
        pyramid: dict[int, Tensor] = {}
        for stride, tap in self.sources.items():
            known = None
            if bank is not None and stride != self.own_stride:
                known = bank.statistics(tap.name)
            pyramid[stride] = self.laterals[str(stride)](maps[tap.name], known)
        stride, x = self.own_stride, pyramid[self.own_stride]
        for block in self.slm:
            stride *= 2
            x = pyramid[stride] = block(x)
        strides = sorted(s for s in pyramid if s >= min(self.levels))
        for fine, coarse in zip(strides[-2::-1], strides[:0:-1], strict=True):
            up = F.interpolate(pyramid[coarse], size=pyramid[fine].shape[-2:])
            pyramid[fine] = pyramid[fine] + up
        return [self.out(pyramid[level]) for level in self.levels]


def _halve(channels: int, num_blocks: int) -> nn.Module:
    """From ``(N, C, H, W)`` to ``(N, C, H / 2, W / 2)``, rounded up."""
    if not num_blocks:
        return nn.MaxPool2d(2, ceil_mode=True)
    strides = [2] + [1] * (num_blocks - 1)
    blocks = [conv_block(channels, channels, 3, stride) for stride in strides]
    return nn.Sequential(*(layer for block in blocks for layer in block))
