"""Images with which a backbone is tried, to learn what it does with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_CHANNELS = 3  # of images for networks that begin with no convolution
_SIDE = 64  # pixels of the image with which a network is tried first
_SIDES = (224, 299)  # of the images that classifiers for one size want
_STRIDE = 32  # of the coarsest map of any family


def image_channels(backbone: nn.Module) -> int:
    """Channels of the images that a network takes."""
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    channels = next((conv.in_channels for conv in convs), _CHANNELS)
    if any(type(m).__name__ == 'Focus' for m in backbone.modules()):
        return channels // 4  # of YOLOX, which folds 2×2 pixels into channels
    # Networks that restore images return what they take, but the first convolution of
    # some sees more channels, as space is folded into them.
    last = getattr(backbone, 'conv_last', None)
    return channels if last is None else min(channels, last.out_channels)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards, every mode is as it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def largest_window(backbone: nn.Module) -> int:
    """The largest attention window that does not fit itself to a smaller map."""
    return max(
        (
            module.window_size
            for module in backbone.modules()
            if not getattr(module, 'pad_small_map', True)
        ),
        default=0,
    )


def trial_sides(backbone: nn.Module) -> list[int]:
    """Sides in pixels of square images to try a network with, until it takes one.

    Small ones come first, as long as attention windows fit, then the one that the
    network was built for, if it tells, and common ones.
    """
    first = max(_SIDE, _STRIDE * largest_window(backbone))
    patch_embed = getattr(backbone, 'patch_embed', None)
    told = (
        getattr(backbone, 'img_size', None),
        getattr(patch_embed, 'init_input_size', None),
    )
    own = [side[0] if isinstance(side, tuple | list) else side for side in told]
    return list(dict.fromkeys([first, *filter(None, own), *_SIDES]))


def black_image(backbone: nn.Module, size: int) -> Tensor:
    """A black image ``(1, C, size, size)`` of the backbone's device and dtype."""
    like = next(backbone.parameters())
    return like.new_zeros(1, image_channels(backbone), size, size)
