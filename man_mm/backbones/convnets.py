"""VGG of mmpretrain and of SSD in mmdet, and ConvNeXt, which mmdet uses too."""

from __future__ import annotations

from torch import nn

from man_mm.core import Unit

from .base import register_units


@register_units('VGG')
def vgg_units(backbone: nn.Module) -> list[Unit]:
    """Every convolution; the last one of a stage with the pooling behind it.

    Args:
        backbone: mmpretrain's VGG; its fully connected layers belong to the last
            module.
    """
    units = []
    features = getattr(backbone, backbone.module_name)
    for stage, (start, stop) in enumerate(backbone.range_sub_modules):
        for index in range(start, stop):
            name = f'{backbone.module_name}.{index}'
            parts: tuple[str, ...] = (name,)
            if isinstance(features[index], nn.MaxPool2d):
                parts = (*units.pop().parts, name)
            units.append(Unit(name, stage, parts))
    return units


@register_units('SSDVGG')
def ssd_vgg_units(backbone: nn.Module) -> list[Unit]:
    """Every convolution with its ReLU; the first one of a stage with the pooling.

    Stages end before the pooling, where SSD reads them. The pooling behind the last
    stage of VGG keeps the size of the map, and so begins no stage.
    """
    units: list[Unit] = []
    parts: tuple[str, ...] = ()
    stage = 0
    for index, layer in enumerate(backbone.features):
        parts = (*parts, f'features.{index}')
        if isinstance(layer, nn.MaxPool2d) and layer.stride > 1:
            stage += 1
        if isinstance(layer, nn.ReLU):
            units.append(Unit(parts[-1], stage, parts))
            parts = ()
    return units


@register_units('ConvNeXt')
def convnext_units(backbone: nn.Module) -> list[Unit]:
    """Every block; the first one of a stage with the downsampling in front of it.

    The norms behind outputs belong to the last module: the loss of the neck and the
    heads trains them.
    """
    units = []
    for stage, blocks in enumerate(backbone.stages):
        for index in range(len(blocks)):
            name = f'stages.{stage}.{index}'
            before = () if index else (f'downsample_layers.{stage}',)
            units.append(Unit(name, stage, (*before, name)))
    return units
