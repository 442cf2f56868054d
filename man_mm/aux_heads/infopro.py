"""The auxiliary head of InfoPro: reconstruct the image, and tell the classes apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .classifier import count_classes, linear_classifier

_DECODER = 12
_FEATURES = 128
_TEMPERATURE = 0.07


@root.MODELS.register_module()
class InfoProHead(AuxHead):
    """Keeps what a module's output tells of the image, beside what it tells of classes.

    After Wang et al., ICLR 2021 (arXiv 2101.10832), equations 5 to 8: lambda1 times
    the binary cross entropy of a reconstruction of the image, plus lambda2 times a
    contrastive loss or the model's own. The decoder enlarges the map to the image's
    size and has two 3×3 convolutions; the other branch has a 3×3 convolution towards
    the width of the next stage, global pooling and two linear layers. Both weights go
    in equal steps from the first head to the last.

    Args:
        site: Where the head sits.
        loss: ``'contrastive'`` or ``'cross_entropy'`` (the model's own loss, which soft
            and several labels need). Defaults to ``'contrastive'``.
        lambda1: Weights of the reconstruction at the first and at the last head.
            Defaults to (5.0, 0.2), those of the paper for ResNet-32 with K = 16.
        lambda2: The same of the other loss. Defaults to (0.05, 0.5).

    Raises:
        ValueError: If an option is unknown, the image does not enter the first unit,
            or the model is not a classifier that knows its number of classes.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition, aux_head = dict(type='StagePartition'), dict(type='InfoProHead')
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['InfoProHead', 'InfoProHead', 'InfoProHead']
    """

    needs_bank = True  # holds the image

    def __init__(
        self,
        site: AuxSite,
        loss: str = 'contrastive',
        lambda1: Sequence[float] = (5.0, 0.2),
        lambda2: Sequence[float] = (0.05, 0.5),
    ) -> None:
        super().__init__()
        if loss not in ('contrastive', 'cross_entropy'):
            raise ValueError(
                f"aux_head.loss must be 'contrastive' or 'cross_entropy', got {loss!r}."
            )
        if site.entry.stride != 1:
            raise ValueError(
                'InfoProHead reconstructs the image, which does not enter the first '
                'unit of this network: use another optim_wrapper.local_learning.'
                'aux_head.'
            )
        count_classes(site.model)  # refuses what has no labels
        own, last = site.own[-1], site.path[-1]
        self.own = own.name
        self.entry = site.entry.name
        self.reads = frozenset([self.entry])
        self.weights = site.interpolate(*lambda1), site.interpolate(*lambda2)
        preprocessor = site.model.data_preprocessor
        for name, value in (('mean', 0.0), ('std', 1.0)):
            value = getattr(preprocessor, name, torch.tensor(value)).clone()
            self.register_buffer(name, value, persistent=False)
        self.decoder = nn.Sequential(
            nn.Conv2d(own.channels, _DECODER, 3, padding=1),
            nn.BatchNorm2d(_DECODER),
            nn.ReLU(inplace=True),
            nn.Conv2d(_DECODER, site.entry.channels, 3, padding=1),
        )
        grows = own.stride < last.stride
        width = min(2 * own.channels, last.channels) if grows else own.channels
        self.features = nn.Sequential(
            nn.Conv2d(own.channels, width, 3, 2 if grows else 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, _FEATURES),
            nn.ReLU(inplace=True),
        )
        self.classifier = self.projection = None
        if loss == 'contrastive':
            self.projection = nn.Linear(_FEATURES, _FEATURES)
        else:
            self.classifier = linear_classifier(site.model, _FEATURES)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Weighted losses of both branches; see `AuxHead.forward`."""
        map_ = maps[self.own]
        image = (maps[self.entry] * self.std + self.mean) / 255
        large = F.interpolate(
            map_, image.shape[2:], mode='bilinear', align_corners=True
        )
        reconstruct = F.binary_cross_entropy_with_logits(
            self.decoder(large), image.clamp(0, 1)
        )
        features = self.features(map_)
        if self.projection is None:
            task = self.classifier.loss((features,), targets)['loss']
        else:
            task = contrastive_loss(self.projection(features), _labels(targets))
        first, second = self.weights
        return dict(loss_image=first * reconstruct, loss_task=second * task)


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Draws images of one class together; arXiv 2101.10832, equation 8.

    The mean, over all pairs of different images of one class, of the negative log
    softmax of their cosine similarity among those to all other images. Zero where no
    two images share a class.

    Args:
        features: Features ``(N, D)`` of any length.
        labels: Classes ``(N,)``.

    Examples:
        >>> import torch
        >>> from man_mm.aux_heads.infopro import contrastive_loss
        >>> features, labels = torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
        >>> others = labels[[0, 2, 1, 3]]
        >>> contrastive_loss(features, labels) < contrastive_loss(features, others)
        tensor(True)
    """
    rows = F.normalize(features, dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = (rows @ rows.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    pairs = (labels[:, None] == labels) & ~itself
    logs = scores.log_softmax(1).masked_fill(~pairs, 0)
    return -logs.sum() / pairs.sum().clamp(min=1)


def _labels(targets: Any) -> Tensor:
    if any('gt_score' in sample or sample.gt_label.numel() != 1 for sample in targets):
        raise ValueError(
            'The contrastive loss of InfoProHead needs one label an image, not soft or '
            'several labels: set optim_wrapper.local_learning.aux_head.loss='
            "'cross_entropy'."
        )
    return torch.cat([sample.gt_label for sample in targets])
