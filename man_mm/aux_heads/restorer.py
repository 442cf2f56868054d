"""What the auxiliary heads of super-resolution models share."""

from __future__ import annotations

from torch import nn


def is_restorer(model: nn.Module) -> bool:
    """Whether a model of mmagic is trained by a pixel loss on ``gt_img``.

    Classes are known by name, as mmagic need not be installed.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    return 'BaseEditModel' in names and isinstance(
        getattr(model, 'pixel_loss', None), nn.Module
    )
