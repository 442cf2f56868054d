"""Swin and Vision Transformers of mmdet and mmpretrain; their maps are tokens."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from man_mm.core import Unit

from .base import register_units

_STAGES = 4  # of a Vision Transformer, which has none of its own


@register_units('SwinTransformer')
def swin_units(backbone: nn.Module) -> list[Unit]:
    """Every block; the first one of a stage with the patch merging in front of it.

    The norms behind outputs belong to the last module: the loss of the neck and the
    heads trains them.

    Raises:
        ValueError: If the outputs of stages are those of the patch merging.
    """
    if getattr(backbone, 'out_after_downsample', False):
        raise ValueError(
            'SwinTransformer with model.backbone.out_after_downsample=True outputs '
            'what the next module makes: set it to False.'
        )
    units = []
    for stage, layer in enumerate(backbone.stages):
        for index in range(len(layer.blocks)):
            name = f'stages.{stage}.blocks.{index}'
            before: tuple[str, ...] = ()
            if not index:
                before = (f'stages.{stage - 1}.downsample',)
            if not units:
                before = ('patch_embed', 'drop_after_pos')
            params = _params(backbone, 'absolute_pos_embed') if not units else ()
            units.append(Unit(name, stage, (*before, name), params, as_map=swin_map))
    return units


@register_units('VisionTransformer')
def vit_units(backbone: nn.Module) -> list[Unit]:
    """Every layer, in four stages of equal length.

    Maps have the patch tokens only: a local loss trains the class token as far as the
    patches of its module attend to it.
    """
    count = len(backbone.layers)
    as_map = partial(
        vit_map, extra=backbone.num_extra_tokens, size=backbone.patch_resolution
    )
    before = ('patch_embed', 'drop_after_pos', 'pre_norm')
    first = [name for name in before if hasattr(backbone, name)]  # DeiT III has no norm
    params = _params(backbone, 'cls_token', 'dist_token', 'pos_embed')
    return [
        Unit(
            f'layers.{index}',
            index * _STAGES // count,
            (*(() if index else first), f'layers.{index}'),
            () if index else params,
            read_elsewhere=index in backbone.out_indices and index < count - 1,
            as_map=as_map,
        )
        for index in range(count)
    ]


def swin_map(tokens: Tensor, args: tuple) -> Tensor:
    """``(N, H * W, C)`` as ``(N, C, H, W)``; blocks are called with (H, W)."""
    _, size = args
    return tokens.transpose(1, 2).unflatten(2, size)


def vit_map(tokens: Tensor, _args: tuple, extra: int, size: tuple[int, int]) -> Tensor:
    """``(N, extra + H * W, C)`` as ``(N, C, H, W)``.

    Args:
        tokens: Extra tokens such as the class token, and one a patch.
        extra: Number of extra tokens.
        size: (H, W) of the images that the backbone was built for; others have to be
            square.

    Raises:
        ValueError: If other images are not square.
    """
    patches = tokens[:, extra:]
    if (count := patches.shape[1]) != math.prod(size):
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(
                f'{count} patches are neither {size[0]}×{size[1]} nor a square: set '
                'model.backbone.img_size to the size of the images.'
            )
        size = (side, side)
    return patches.transpose(1, 2).unflatten(2, size)


def _params(backbone: nn.Module, *names: str) -> tuple[str, ...]:
    return tuple(
        name
        for name in names
        if isinstance(getattr(backbone, name, None), nn.Parameter)
    )
