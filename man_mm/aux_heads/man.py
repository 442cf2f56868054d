"""MANHead: the MAN auxiliary head that fits the model."""

from __future__ import annotations

from typing import Any

from mmengine import registry as root

from .base import AuxHead, AuxSite
from .man_det import MANDetHead


@root.MODELS.register_module()
def MANHead(site: AuxSite, **options: Any) -> AuxHead:  # noqa: N802
    """Builds the MAN head for the task of the model.

    Args:
        site: Where the head sits.
        **options: Passed to `MANDetHead`.

    Raises:
        ValueError: If there is no MAN head for models of this kind.
    """
    heads = ('bbox_head', 'rpn_head')
    if any(getattr(site.model, head, None) is not None for head in heads):
        return MANDetHead(site, **options)
    raise ValueError(
        f'aux_head.type=MANHead knows no auxiliary head for '
        f'{type(site.model).__name__}; it serves one-stage and two-stage detectors '
        '(models with a bbox_head or an rpn_head). Register a man_mm.AuxHead of your '
        'own in mmengine.registry.MODELS.'
    )
