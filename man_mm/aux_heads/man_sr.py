"""The MAN auxiliary head for super-resolution networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.backbones import find_backbone, find_scale, image_channels
from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .restorer import is_restorer


@root.MODELS.register_module()
class MANSRHead(AuxHead):
    """Restores the high-resolution image from one module's output and the bank.

    After arXiv 2406.00446, section 3: an SLM of residual blocks, the bank's shallow
    features as the local counterpart of the network's global skip, and an upsampler of
    its own; the loss is the model's pixel loss against the whole target. The upsampler
    is one convolution and a pixel shuffle (Shi et al., arXiv 1609.05158), so that no
    map of the head is larger than the target. Where the first module starts with the
    image itself (SRResNet), the skip adds the enlarged image, as the network's does.

    Args:
        site: Where the head sits.
        channels: Width. Defaults to None, half of the channels of the module's output.
        num_blocks: Residual blocks in the SLM. Defaults to 1.
        use_bank: Whether to read the shallow features, or the image. Defaults to True.

    Raises:
        ValueError: If an option is out of range, or the model of another kind.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='MANSRHead', num_blocks=2)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['MANSRHead', 'MANSRHead', 'MANSRHead']
    """

    def __init__(
        self,
        site: AuxSite,
        channels: int | None = None,
        num_blocks: int = 1,
        use_bank: bool = True,
    ) -> None:
        super().__init__()
        if not is_restorer(site.model):
            raise ValueError(
                'MANSRHead trains super-resolution models of mmagic, not '
                f"{type(site.model).__name__}: set aux_head.type='MANHead', which "
                'chooses.'
            )
        own = site.own[-1]
        channels = own.channels // 2 if channels is None else channels
        if channels < 1 or num_blocks < 0:
            raise ValueError(
                'aux_head.channels must be at least 1 and aux_head.num_blocks at least '
                f'0, got {channels} and {num_blocks}.'
            )
        self.own = own.name
        self.entry = site.entry.name
        self.needs_bank = use_bank
        self.reads = frozenset([self.entry] if use_bank else [])
        self.lateral = nn.Conv2d(own.channels, channels, 3, padding=1)
        self.slm = nn.Sequential(*(_ResidualBlock(channels) for _ in range(num_blocks)))
        backbone = find_backbone(site.model)[1]
        factor = own.stride * find_scale(backbone)
        self.upsample = _upsampler(backbone, channels, factor)
        is_image = site.entry.channels == image_channels(backbone)
        self.features_skip = self.image_skip = None
        if use_bank and is_image:
            self.image_skip = nn.Upsample(scale_factor=factor, mode='bilinear')
        elif use_bank:
            self.features_skip = nn.Conv2d(site.entry.channels, channels, 1)
        self.pixel_loss = copy.deepcopy(site.model.pixel_loss)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local pixel loss; see `AuxHead.forward`."""
        features = self.slm(self.lateral(maps[self.own]))
        if self.features_skip is not None:
            features = features + self.features_skip(maps[self.entry])
        images = self.upsample(features)
        if self.image_skip is not None:
            images = images + self.image_skip(maps[self.entry])
        height, width = targets.gt_img.shape[-2:]
        # SwinIR pads what is no multiple of its window, at the bottom and on the right.
        images = images[..., :height, :width]
        return dict(loss=self.pixel_loss(images, targets.gt_img))


def _upsampler(backbone: nn.Module, channels: int, factor: int) -> nn.Sequential:
    """From ``(N, channels, H, W)`` to an image ``factor`` times as large."""
    conv = nn.Conv2d(channels, image_channels(backbone) * factor**2, 3, padding=1)
    mean = getattr(backbone, 'mean', None)
    if isinstance(mean, Tensor):  # which such a network adds to its output
        with torch.no_grad():
            conv.bias += mean.flatten().repeat_interleave(factor**2)
    return nn.Sequential(conv, nn.PixelShuffle(factor))


class _ResidualBlock(nn.Module):
    """Convolution, ReLU and convolution around which a skip leads; no norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for conv in (self.conv1, self.conv2):  # close to the identity, as in ESRGAN
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
            with torch.no_grad():
                conv.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(x)))
