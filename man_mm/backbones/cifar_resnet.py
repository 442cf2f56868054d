"""The ResNet for small images in which the literature compares local learning."""

from __future__ import annotations

import torch.nn.functional as F
from mmengine import registry as root
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_INIT = (
    dict(type='Kaiming', layer='Conv2d'),
    dict(type='Constant', val=1, layer='BatchNorm2d'),
)


@root.MODELS.register_module()
class CIFARResNet(BaseModule):
    """ResNet-20, -32, -56, -110 and so on, for images of 32×32 pixels or so.

    After He et al. 2016 (arXiv 1512.03385), section 4.2: a 3×3 convolution, then three
    stages of n residual blocks with 16, 32 and 64 channels, 6n + 2 layers in all.
    Shortcuts have no parameters (option A): where a stage begins, they skip every
    second pixel and add channels of zeros. mmpretrain's ``ResNet_CIFAR`` is another
    network, four stages of 64 to 512 channels.

    Args:
        depth: Number of layers, 6n + 2.
        in_channels: Channels of the images. Defaults to 3.
        base_channels: Channels of the first stage. Defaults to 16.
        with_cp: Whether to recompute the blocks in the backward pass (activation
            checkpointing). Defaults to False.
        init_cfg: Initial weights. Defaults to those of He et al. 2015.

    Raises:
        ValueError: If ``depth`` is not 6n + 2 with n at least 1.

    Examples:
        >>> import torch
        >>> from man_mm import CIFARResNet
        >>> (map_,) = CIFARResNet(depth=20)(torch.rand(2, 3, 32, 32))
        >>> map_.shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        base_channels: int = 16,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | tuple[dict, ...] = _INIT,
    ) -> None:
        super().__init__(init_cfg)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(
                'model.backbone.depth of a CIFARResNet must be 6n + 2, such as 20, 32, '
                f'56 or 110; got {depth}.'
            )
        self.conv1 = nn.Conv2d(in_channels, base_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.res_layers = ['layer1', 'layer2', 'layer3']
        channels = base_channels
        for stage, name in enumerate(self.res_layers):
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layer.append(BasicBlock(channels, channels * stride, stride, with_cp))
                channels *= stride
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Maps images ``(N, C, H, W)`` to ``((N, 64, H / 4, W / 4),)``."""
        x = self.relu(self.norm1(self.conv1(x)))
        for name in self.res_layers:
            x = getattr(self, name)(x)
        return (x,)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around which a shortcut without parameters leads.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output, at least as many.
        stride: Stride. Defaults to 1.
        with_cp: Whether to recompute the block in the backward pass. Defaults to False.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, with_cp: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.more = channels - in_channels
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, in_channels, H, W)`` to ``(N, channels, H / s, W / s)``."""
        if self.with_cp and x.requires_grad:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            x = F.pad(x, (0, 0, 0, 0, 0, self.more))
        return self.relu(y + x)
