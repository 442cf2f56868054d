"""What the auxiliary heads of image classifiers share: classes, labels and the loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import registry as root
from torch import Tensor, nn

from .base import in_full_precision


def is_classifier(model: nn.Module) -> bool:
    """Whether a model is trained by a classification head of mmpretrain.

    Classes are known by name, as mmpretrain need not be installed.
    """
    names = {cls.__name__ for cls in type(getattr(model, 'head', None)).__mro__}
    return bool(names & {'ClsHead', 'MultiLabelClsHead'})


def count_classes(model: nn.Module) -> int:
    """The number of classes of a classifier of mmpretrain.

    Its head tells, or its backbone, where that classifies too, as VGG does.

    Raises:
        ValueError: If neither does.
    """
    holders = [getattr(model, name, None) for name in ('head', 'backbone')]
    counts = [getattr(holder, 'num_classes', None) for holder in holders]
    counts = [count for count in counts if isinstance(count, int) and count > 0]
    if not is_classifier(model) or not counts:
        raise ValueError(
            'Auxiliary heads of classifiers read the number of classes from '
            f'model.head, here a {type(holders[0]).__name__} without num_classes: use '
            'a head of mmpretrain that has it, such as LinearClsHead.'
        )
    return counts[0]


def linear_classifier(model: nn.Module, in_channels: int) -> nn.Module:
    """A linear head of mmpretrain with the classes and the loss of a model's head.

    It maps features ``(N, in_channels)`` to ``(N, C)``; ``loss((features,), targets)``
    returns a dictionary.

    Args:
        model: A classifier of mmpretrain.
        in_channels: Channels of the features.

    Raises:
        ValueError: If the model's head does not know its number of classes.
    """
    num_classes = count_classes(model)
    names = [cls.__name__ for cls in type(model.head).__mro__]
    kind = 'MultiLabelLinear' if 'MultiLabelClsHead' in names else 'Linear'
    classifier = root.MODELS.build(
        dict(
            type=f'mmpretrain.{kind}ClsHead',
            num_classes=num_classes,
            in_channels=in_channels,
            loss=copy.deepcopy(model.head.loss_module),
        )
    )
    classifier.init_weights()
    classifier.register_forward_hook(in_full_precision)
    return classifier


def label_scores(targets: Any, num_classes: int) -> Tensor:
    """Labels as scores ``(N, C)``: ones and zeros, or soft labels as they are.

    Args:
        targets: Data samples of mmpretrain.
        num_classes: Number of classes C.
    """
    scores = [
        sample.gt_score
        if 'gt_score' in sample
        else F.one_hot(sample.gt_label, num_classes).sum(0)
        for sample in targets
    ]
    return torch.stack(scores).float()
