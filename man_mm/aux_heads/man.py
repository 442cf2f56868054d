"""MANHead: the MAN auxiliary head that fits the model."""

from __future__ import annotations

import inspect
from typing import Any

from mmengine import registry as root
from torch import nn

from .base import AuxHead, AuxSite
from .classifier import is_classifier
from .detector import is_detector
from .man_cls import MANClsHead
from .man_det import MANDetHead
from .man_sr import MANSRHead
from .restorer import is_restorer


@root.MODELS.register_module()
def MANHead(site: AuxSite, **options: Any) -> AuxHead:  # noqa: N802
    """Builds the MAN head for the task of the model.

    Args:
        site: Where the head sits.
        **options: Passed to `MANDetHead`, `MANClsHead` or `MANSRHead`.

    Raises:
        ValueError: If there is no MAN head for models of this kind, or it does not
            have one of the options.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='MANHead', channels=32)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['MANClsHead', 'MANClsHead', 'MANClsHead']
    """
    head = _head_for(site.model)
    _, *known = inspect.signature(head).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f'aux_head has unknown options {unknown}; for a '
            f'{type(site.model).__name__}, {head.__name__} takes {known}.'
        )
    return head(site, **options)


def _head_for(model: nn.Module) -> type[AuxHead]:
    if is_detector(model):
        return MANDetHead
    if is_classifier(model):
        return MANClsHead
    if is_restorer(model):
        return MANSRHead
    raise ValueError(
        f'aux_head.type=MANHead knows no auxiliary head for {type(model).__name__}; '
        'it serves detectors of mmdet (models with a roi_head, rpn_head, bbox_head, '
        'mask_head or panoptic_head of known num_classes), image classifiers (models '
        'whose head is a ClsHead of mmpretrain) and super-resolution models (a '
        'BaseEditModel of mmagic with a pixel_loss). Register a man_mm.AuxHead of your '
        'own in mmengine.registry.MODELS.'
    )
