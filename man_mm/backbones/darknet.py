"""Darknet-53 of YOLOv3, CSPDarknet of YOLOX and CSPNeXt of RTMDet, in mmdet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from man_mm.core import Unit

from .base import register_units


@register_units('Darknet')
def darknet_units(backbone: nn.Module) -> list[Unit]:
    """The first convolution; in every stage the strided one and each residual block.

    Args:
        backbone: A backbone that lists its stages in ``cr_blocks``, the stem first.
    """
    return _layers(backbone, backbone.cr_blocks)


@register_units('CSPDarknet', 'CSPNeXt')
def csp_units(backbone: nn.Module) -> list[Unit]:
    """The stem; in every stage the strided convolution, the pooling and the CSP layer.

    A CSP layer is one unit: a second path leads around all of its blocks.

    Args:
        backbone: A backbone that lists its stages in ``layers``, the stem first.
    """
    return _layers(backbone, backbone.layers)


def _layers(backbone: nn.Module, names: Sequence[str]) -> list[Unit]:
    """Each layer of each stage; the stem has stage -1."""
    units = []
    for stage, name in enumerate(names, start=-1):
        layer = getattr(backbone, name)
        if not isinstance(layer, nn.Sequential):
            units.append(Unit(name, stage))
            continue
        units += [Unit(f'{name}.{part}', stage) for part, _ in layer.named_children()]
    return units
