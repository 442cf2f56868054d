"""The MAN auxiliary head for image classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .blocks import conv_block
from .classifier import linear_classifier
from .copies import fresh_block

_EXPANSION = 4


@root.MODELS.register_module()
class MANClsHead(AuxHead):
    """Classifies images from one module's output and the memory bank.

    The number of classes and the loss (label smoothing, soft labels, binary cross
    entropy of multi-label heads) are the model's own. After arXiv 2406.00446,
    section 3: an SLM, global pooling, pooled features of earlier modules, and one
    linear classifier over both.

    Of each finished stage one map is read, and of that only the global average.

    Args:
        site: Where the head sits.
        mode: ``'light'`` makes the SLM of `PooledSLM`; ``'faithful'`` of one block of
            the model's own kind and full width for each later stage. Defaults to
            ``'light'``.
        channels: Width of the light SLM and of each vector from the bank; the
            classifier sees four times as many channels of the SLM. Defaults to 64.
        num_blocks: Convolutions, or blocks, of the SLM for each later stage; with 0
            there is no SLM, and the module's own map is pooled. Defaults to 1.
        use_bank: Whether to read pooled maps of earlier modules. Defaults to True.
        fusion: How vectors from the bank enter: ``'concatenate'`` them to the SLM's
            features, or ``'add'``. Defaults to ``'concatenate'``.
        norm: Norm of the light SLM: ``'GN'``, or ``'BN'``, which learns faster where
            the batch is large: GroupNorm takes from each image what the pooling behind
            it could tell images apart by. Defaults to ``'GN'``.

    Raises:
        ValueError: If an option is unknown or out of range, the model's head does not
            know its number of classes, or ``mode='faithful'`` meets a network whose
            blocks do not work on maps.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='MANClsHead', channels=32)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['MANClsHead', 'MANClsHead', 'MANClsHead']
    """

    reads_averages = True

    def __init__(
        self,
        site: AuxSite,
        mode: str = 'light',
        channels: int = 64,
        num_blocks: int = 1,
        use_bank: bool = True,
        fusion: str = 'concatenate',
        norm: str = 'GN',
    ) -> None:
        super().__init__()
        for key, value, known in (
            ('mode', mode, ('light', 'faithful')),
            ('fusion', fusion, ('concatenate', 'add')),
            ('norm', norm, ('GN', 'BN')),
        ):
            if value not in known:
                raise ValueError(
                    f'aux_head.{key} must be one of {known}, got {value!r}.'
                )
        if channels < 1 or num_blocks < 0:
            raise ValueError(
                'aux_head.channels must be at least 1 and aux_head.num_blocks at least '
                f'0, got {channels} and {num_blocks}.'
            )
        own = site.own[-1]
        # The blocks of a stage add to one stream: its last map stands for all.
        stages = {tap.stage: tap for tap in site.earlier if tap.stage < own.stage}
        earlier = list(stages.values()) if use_bank else []
        self.own = own.name
        self.earlier = [tap.name for tap in earlier]
        self.needs_bank = bool(earlier)
        self.reads = frozenset(self.earlier)
        if not num_blocks:
            self.slm = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            width = own.channels
        elif mode == 'light':
            later = [tap.stride for tap in site.later]
            self.slm = PooledSLM(
                own.channels, own.stride, later, channels, num_blocks, norm
            )
            width = _EXPANSION * channels
        else:
            self.slm = FullSLM(site, num_blocks)
            width = site.later[-1].channels
        self.adds = fusion == 'add'
        size = width if self.adds else channels
        self.vectors = nn.ModuleList(nn.Linear(tap.channels, size) for tap in earlier)
        in_channels = width if self.adds else width + size * len(earlier)
        self.classifier = linear_classifier(site.model, in_channels)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local classification loss; see `AuxHead.forward`."""
        return self.classifier.loss((self.features(maps, bank),), targets)

    def features(self, maps: Mapping[str, Tensor], bank: MemoryBank | None) -> Tensor:
        """What the classifier sees, ``(N, C)``: the SLM, and vectors from the bank."""
        features = [self.slm(maps[self.own])]
        for name, linear in zip(self.earlier, self.vectors, strict=True):
            known = None if bank is None else bank.statistics(name)
            vector = _standardised(maps[name].detach().mean((2, 3)), known)
            features.append(linear(vector).relu())
        return sum(features) if self.adds else torch.cat(features, dim=1)


class PooledSLM(nn.Module):
    """From a module's map to one vector, over every scale of the later stages.

    Average pooling to half the size; a 1×1 convolution; a 3×3 convolution for each
    later stage, at that stage's scale; a 1×1 convolution that widens, as in a
    bottleneck block, so that the classifier sees more than ``channels`` directions;
    global average pooling. At the map's own size the 1×1 convolution alone would cost
    as much as all of it does. What it saves for its backward pass is less than a map
    of ResNet-50, whose gradient needs that memory a moment later anyway, so that the
    peak of a step stays the same.

    Args:
        in_channels: Channels of the map.
        stride: Its stride in pixels.
        later: Strides of the later stages, in order.
        channels: Width.
        num_blocks: 3×3 convolutions for each later stage. Defaults to 1.
        norm: ``'GN'`` or ``'BN'``. Defaults to ``'GN'``.
    """

    def __init__(
        self,
        in_channels: int,
        stride: int,
        later: list[int],
        channels: int,
        num_blocks: int = 1,
        norm: str = 'GN',
    ) -> None:
        super().__init__()
        self.pool = 2 if max(later) > stride else 1
        stride *= self.pool
        blocks = [conv_block(in_channels, channels, 1, norm=norm)]
        for end in later:
            step = max(end // stride, 1)
            for first in [step] + [1] * (num_blocks - 1):
                blocks.append(conv_block(channels, channels, 3, first, norm))
            stride *= step
        blocks.append(conv_block(channels, _EXPANSION * channels, 1, norm=norm))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, map_: Tensor) -> Tensor:
        """Maps ``(N, in_channels, H, W)`` to ``(N, 4 * channels)``."""
        if self.pool > 1:
            # Borders of odd maps count too, and maps of one location stay.
            map_ = F.avg_pool2d(map_, self.pool, ceil_mode=True)
        return self.blocks(map_).mean((2, 3))


class FullSLM(nn.Module):
    """From a module's map to one vector, by blocks of the model's own kind.

    Args:
        site: Where the head sits.
        num_blocks: Blocks for each later stage.
    """

    def __init__(self, site: AuxSite, num_blocks: int) -> None:
        super().__init__()
        begun = site.own[-1].stage
        self.blocks = nn.Sequential(
            *(
                fresh_block(
                    site.model, tap.stage, whole=tap.stage != begun and not index
                )
                for tap in site.later
                for index in range(num_blocks)
            )
        )

    def forward(self, map_: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, C')``, C' the channels of the last stage."""
        return self.blocks(map_).mean((2, 3))


def _standardised(vector: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """Standardises ``(N, C)`` by a mean and a variance ``(C,)``, if they are known."""
    if known is None:
        return vector
    mean, variance = (x.to(vector) for x in known)
    return (vector - mean) * (variance + 1e-5).rsqrt()
