"""ResNet, ResNeXt, RegNet, Res2Net, ResNeSt, and this package's `CIFARResNet`."""

from __future__ import annotations

from torch import nn

from man_mm.core import Unit

from .base import register_units


@register_units('ResNet', 'ResNeXt', 'RegNet', 'Res2Net', 'ResNeSt', 'CIFARResNet')
def resnet_units(backbone: nn.Module) -> list[Unit]:
    """The stem and every residual block, stage by stage.

    Args:
        backbone: A backbone that lists its stages in ``res_layers``, each a
            sequence of blocks.
    """
    stages = list(backbone.res_layers)
    stem = [name for name, _ in backbone.named_children() if name not in stages]
    # RegNet and the CIFAR variants have no pooling, deep stems no separate ReLU.
    stem_end = next(name for name in ('maxpool', 'stem', 'relu') if name in stem)
    units = [Unit(stem_end, -1, tuple(stem))]
    for stage, layer in enumerate(stages):
        for block in range(len(getattr(backbone, layer))):
            units.append(Unit(f'{layer}.{block}', stage))
    return units
