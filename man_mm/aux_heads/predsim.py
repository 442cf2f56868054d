"""The auxiliary head of PredSim: a prediction loss and a similarity matching loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .classifier import count_classes, label_scores, linear_classifier

_FEATURES = 2048


@root.MODELS.register_module()
class PredSimHead(AuxHead):
    """Classifies images, and makes those of one class look alike to each other only.

    After Nøkland and Eidnes, ICML 2019 (arXiv 1901.06656): (1 - beta) times the loss
    of a linear classifier on the pooled map, plus beta times the mean squared error
    between two similarity matrices of the batch (`similarity_matrix`): that of the
    labels, and that of the standard deviations of the map's channels behind a 3×3
    convolution. The classifier's loss is the model's own.

    Args:
        site: Where the head sits.
        beta: Weight of the similarity matching loss, in [0, 1]. Defaults to 0.99.

    Raises:
        ValueError: If ``beta`` is out of range, or the model is not a classifier that
            knows its number of classes.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='PredSimHead', beta=0.9)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['PredSimHead', 'PredSimHead', 'PredSimHead']
    """

    def __init__(self, site: AuxSite, beta: float = 0.99) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f'aux_head.beta must be in [0, 1], got {beta}.')
        own = site.own[-1]
        self.own = own.name
        self.beta = beta
        self.side = max(math.isqrt(_FEATURES // own.channels), 1)
        self.num_classes = count_classes(site.model)
        self.classifier = linear_classifier(site.model, own.channels * self.side**2)
        self.conv = nn.Conv2d(own.channels, own.channels, 3, padding=1, bias=False)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Weighted prediction and similarity losses; see `AuxHead.forward`."""
        map_ = maps[self.own]
        pooled = F.adaptive_avg_pool2d(map_, self.side).flatten(1)
        predicted = self.classifier.loss((pooled,), targets)
        # The spread over all locations tells in which images a filter fires at all.
        spread = self.conv(map_).flatten(2).std(2)
        labels = label_scores(targets, self.num_classes).to(spread)
        similar = F.mse_loss(similarity_matrix(spread), similarity_matrix(labels))
        return dict(
            loss_pred=(1 - self.beta) * predicted['loss'],
            loss_sim=self.beta * similar,
        )


def similarity_matrix(features: Tensor) -> Tensor:
    """Adjusted cosine similarities ``(N, N)`` of the rows of ``(N, D)`` features.

    Each row is centred and scaled to length 1 first; arXiv 1901.06656, section 2.2.

    Examples:
        >>> import torch
        >>> from man_mm.aux_heads.predsim import similarity_matrix
        >>> similarity_matrix(torch.eye(2)).sign()
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    rows = F.normalize(features - features.mean(1, keepdim=True), dim=1)
    return torch.mm(rows, rows.T)
