"""EDSR, SRResNet, RRDB, RDN and SwinIR, the super-resolution networks of mmagic.

All of them are a shallow convolution, a body of equal blocks and an upsampler. The
body is cut; what is behind it belongs to the last module. Where a global skip leads
from the shallow features around the body, the shallow convolution belongs to the last
module too, and gets its exact gradient; otherwise it is part of the first unit.
"""

from __future__ import annotations

from torch import Tensor, nn

from man_mm.core import Unit

from .base import register_units

_STAGES = 4


@register_units('EDSRNet', 'RRDBNet')
def edsr_units(backbone: nn.Module) -> list[Unit]:
    """Every residual block; the shallow features are read behind the body too."""
    return _blocks('body', backbone.body)


@register_units('MSRResNet')
def srresnet_units(backbone: nn.Module) -> list[Unit]:
    """The shallow convolution with the first block, and every other block."""
    return _blocks('trunk_net', backbone.trunk_net, before=('conv_first', 'lrelu'))


@register_units('RDNNet')
def rdn_units(backbone: nn.Module) -> list[Unit]:
    """Every residual dense block; all of them are read behind the body too."""
    return _blocks('rdbs', backbone.rdbs, before=('sfe2',), read_elsewhere=True)


@register_units('SwinIRNet')
def swinir_units(backbone: nn.Module) -> list[Unit]:
    """Every residual Swin Transformer block (RSTB), whose maps are tokens.

    Raises:
        ValueError: If the network has an absolute position embedding.
    """
    if backbone.ape:
        raise ValueError(
            'SwinIRNet with generator.ape=True takes images of one size only, and its '
            'position embedding lies between units: set generator.ape=False.'
        )
    before = ('patch_embed', 'pos_drop')
    return _blocks('layers', backbone.layers, before=before, as_map=_as_map)


def _as_map(tokens: Tensor, args: tuple) -> Tensor:
    """``(N, H * W, C)`` as ``(N, C, H, W)``; the blocks are called with (H, W)."""
    _, size = args
    return tokens.transpose(1, 2).unflatten(2, size)


def _blocks(
    name: str, blocks: nn.Module, before: tuple[str, ...] = (), **kwargs
) -> list[Unit]:
    """One unit a block, the first with what is before it, in four stages.

    The last stage is shorter, because its module also runs the upsampler.
    """
    units = []
    for index in range(len(blocks)):
        stage = index * _STAGES // (len(blocks) * 9 // 8)
        block = f'{name}.{index}'
        parts = (*before, block) if index == 0 else (block,)
        units.append(Unit(block, stage, parts, **kwargs))
    return units
