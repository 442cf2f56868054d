"""The auxiliary head of Decoupled Greedy Learning (DGL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .blocks import conv_block
from .classifier import linear_classifier

_LAYERS = 3


@root.MODELS.register_module()
class DGLHead(AuxHead):
    """Classifies images from a small version of one module's output.

    After Belilovsky et al., ICML 2020 (arXiv 1901.08164), their ``MLP-SR-aux``: average
    pooling to a quarter of the height and of the width; three 1×1 convolutions, each
    with batch norm and ReLU; average pooling to 2×2; an MLP of three layers. All layers
    are as wide as what they get. The loss is the model's own.

    Args:
        site: Where the head sits.

    Raises:
        ValueError: If the model is not a classifier that knows its number of classes.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition, aux_head = dict(type='StagePartition'), dict(type='DGLHead')
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['DGLHead', 'DGLHead', 'DGLHead']
    """

    def __init__(self, site: AuxSite) -> None:
        super().__init__()
        own = site.own[-1]
        self.own = own.name
        self.convs = nn.Sequential(
            *(
                layer
                for _ in range(_LAYERS)
                for layer in conv_block(own.channels, own.channels, 1, norm='BN')
            )
        )
        width = 4 * own.channels
        self.mlp = nn.Sequential()
        for _ in range(_LAYERS - 1):
            self.mlp.append(nn.Linear(width, width, bias=False))
            self.mlp.append(nn.BatchNorm1d(width))
            self.mlp.append(nn.ReLU(inplace=True))
        self.classifier = linear_classifier(site.model, width)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local classification loss; see `AuxHead.forward`."""
        map_ = maps[self.own]
        height, width = (-(-side // 4) for side in map_.shape[2:])
        map_ = self.convs(F.adaptive_avg_pool2d(map_, (height, width)))
        features = self.mlp(F.adaptive_avg_pool2d(map_, 2).flatten(1))
        return self.classifier.loss((features,), targets)
