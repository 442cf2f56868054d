"""The auxiliary head of AugLocal: a few of the layers that lie ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine import registry as root
from torch import Tensor, nn

from man_mm.backbones import Tap
from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .classifier import linear_classifier
from .copies import fresh_block


@root.MODELS.register_module()
class AugLocalHead(AuxHead):
    """Classifies images by copies of later layers, taken at equal distances.

    After Ma et al., ICLR 2024 (arXiv 2402.17318), section 3: of the units ahead, d are
    taken that are equally far from each other, the last one included. Their blocks,
    with weights of their own, global pooling and a linear classifier make the head. It
    gets shallower with depth: d falls in equal steps from ``depth`` to (1 - tau) times
    that. The loss is the model's own.

    A block that enters another stage is a copy of that stage's first block, which
    brings its stride and width. Where a stage is skipped, a 1×1 convolution with batch
    norm stands for it.

    Args:
        site: Where the head sits.
        depth: Number of blocks in the first head. Defaults to 2, the paper's for
            ResNet-32 with K = 16.
        tau: How much of the depth the last head lacks, in [0, 1]. Defaults to 0.5.

    Raises:
        ValueError: If an option is out of range, the units do not work on maps, or the
            model is not a classifier that knows its number of classes.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='AugLocalHead', depth=2)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['AugLocalHead', 'AugLocalHead', 'AugLocalHead']
    """

    def __init__(self, site: AuxSite, depth: int = 2, tau: float = 0.5) -> None:
        super().__init__()
        if depth < 1 or not 0 <= tau <= 1:
            raise ValueError(
                'aux_head.depth must be at least 1 and aux_head.tau in [0, 1], got '
                f'{depth} and {tau}.'
            )
        own = site.own[-1]
        self.own = own.name
        self.blocks = nn.Sequential()
        last = own
        for tap in spread(
            site.ahead, round(site.interpolate(depth, depth * (1 - tau)))
        ):
            self.blocks.append(_enter(site, last, tap))
            last = tap
        self.classifier = linear_classifier(site.model, last.channels)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local classification loss; see `AuxHead.forward`."""
        features = self.blocks(maps[self.own]).mean((2, 3))
        return self.classifier.loss((features,), targets)


def spread(taps: tuple[Tap, ...], count: int) -> list[Tap]:
    """Takes some taps at equal distances, the last one included.

    Args:
        taps: What to take from.
        count: How many; at least one, and all if there are fewer.

    Examples:
        >>> from man_mm.aux_heads.auglocal import spread
        >>> spread(('a', 'b', 'c', 'd'), count=2)
        ['b', 'd']
    """
    count = min(max(count, 1), len(taps))
    return [taps[round(len(taps) * i / count) - 1] for i in range(1, count + 1)]


def _enter(site: AuxSite, last: Tap, tap: Tap) -> nn.Module:
    """A block that leads from the map of one unit to that of a later one."""
    block = fresh_block(site.model, tap.stage, whole=tap.stage > last.stage)
    before = [end for end in site.path if end.stage == tap.stage - 1]
    if tap.stage <= last.stage or not before:
        return block
    needed = before[-1]
    if (needed.channels, needed.stride) == (last.channels, last.stride):
        return block
    return nn.Sequential(
        nn.Conv2d(
            last.channels,
            needed.channels,
            1,
            needed.stride // last.stride,
            bias=False,
        ),
        nn.BatchNorm2d(needed.channels),
        block,
    )
