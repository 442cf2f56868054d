"""The MAN auxiliary head for image classifiers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite, in_full_precision
from .blocks import conv_block

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
        mode: ``'light'``, the only one.
        channels: Width of the SLM and of each vector from the bank; the classifier
            sees four times as many channels of the SLM. Default: 64.
        use_bank: Whether to read pooled maps of earlier modules. Default: True.

    Raises:
        ValueError: If an option is unknown, or the model's head does not tell its
            number of classes.
    """

    reads_averages = True

    def __init__(
        self,
        site: AuxSite,
        mode: str = 'light',
        channels: int = 64,
        use_bank: bool = True,
    ) -> None:
        super().__init__()
        if mode != 'light':
            raise ValueError(
                f"aux_head.mode must be 'light' for classifiers, got {mode!r}."
            )
        own = site.own[-1]
        # The blocks of a stage add to one stream: its last map stands for all.
        stages = {tap.stage: tap for tap in site.earlier if tap.stage < own.stage}
        earlier = list(stages.values()) if use_bank else []
        self.own = own.name
        self.earlier = [tap.name for tap in earlier]
        self.needs_bank = bool(earlier)
        self.reads = frozenset(self.earlier)
        self.slm = PooledSLM(
            own.channels, own.stride, [tap.stride for tap in site.later], channels
        )
        self.vectors = nn.ModuleList(
            nn.Linear(tap.channels, channels) for tap in earlier
        )
        self.classifier = _classifier(
            getattr(site.model, 'head', None), channels * (_EXPANSION + len(earlier))
        )

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local classification loss; see `AuxHead.forward`."""
        features = [self.slm(maps[self.own])]
        for name, linear in zip(self.earlier, self.vectors, strict=True):
            known = None if bank is None else bank.statistics(name)
            vector = _standardised(maps[name].detach().mean((2, 3)), known)
            features.append(linear(vector).relu())
        return self.classifier.loss((torch.cat(features, dim=1),), targets)


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
    """

    def __init__(
        self, in_channels: int, stride: int, later: list[int], channels: int
    ) -> None:
        super().__init__()
        self.pool = 2 if max(later) > stride else 1
        stride *= self.pool
        blocks = [conv_block(in_channels, channels, 1)]
        for end in later:
            step = max(end // stride, 1)
            blocks.append(conv_block(channels, channels, 3, step))
            stride *= step
        blocks.append(conv_block(channels, _EXPANSION * channels, 1))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, map_: Tensor) -> Tensor:
        """Maps ``(N, in_channels, H, W)`` to ``(N, 4 * channels)``."""
        if self.pool > 1:
            # Borders of odd maps count too, and maps of one location stay.
            map_ = F.avg_pool2d(map_, self.pool, ceil_mode=True)
        return self.blocks(map_).mean((2, 3))


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is trained by a classification head of mmpretrain.

    Classes are known by name, as mmpretrain need not be installed.
    """
    names = {cls.__name__ for cls in type(getattr(model, 'head', None)).__mro__}
    return bool(names & {'ClsHead', 'MultiLabelClsHead'})


def _classifier(head: nn.Module | None, in_channels: int) -> nn.Module:
    """A linear head of mmpretrain with the classes and the loss of another one."""
    num_classes = getattr(head, 'num_classes', None)
    if num_classes is None:
        raise ValueError(
            f'MANClsHead cannot read the number of classes from model.head, a '
            f'{type(head).__name__} without num_classes: use a head that has it, such '
            'as LinearClsHead.'
        )
    names = [cls.__name__ for cls in type(head).__mro__]
    kind = 'MultiLabelLinear' if 'MultiLabelClsHead' in names else 'Linear'
    classifier = root.MODELS.build(
        dict(
            type=f'mmpretrain.{kind}ClsHead',
            num_classes=num_classes,
            in_channels=in_channels,
            loss=copy.deepcopy(head.loss_module),
        )
    )
    classifier.init_weights()
    classifier.register_forward_hook(in_full_precision)
    return classifier


def _standardised(vector: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """Standardises ``(N, C)`` by a mean and a variance ``(C,)``, if they are known."""
    if known is None:
        return vector
    mean, variance = (x.to(vector) for x in known)
    return (vector - mean) * (variance + 1e-5).rsqrt()
