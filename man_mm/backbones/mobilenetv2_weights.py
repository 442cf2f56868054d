"""ImageNet weights of MobileNetV2 under the names that OpenMMLab's networks use."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def rename_weights(
    weights: Mapping[str, Tensor], backbone: nn.Module
) -> dict[str, Tensor]:
    """Renames weights by their order, as two implementations of a network list them.

    Args:
        weights: State dict of another implementation, such as torchvision's, up to
            the last convolution.
        backbone: ``MobileNetV2`` of mmdet or mmpretrain.

    Returns:
        A state dict for ``backbone``.

    Raises:
        ValueError: If numbers or shapes differ.
    """
    wanted = backbone.state_dict()
    shapes = [weight.shape for weight in weights.values()]
    if shapes != [weight.shape for weight in wanted.values()]:
        raise ValueError(
            f'{len(weights)} weights do not fit the {len(wanted)} of '
            f'{type(backbone).__name__} in their order: give the weights of '
            'MobileNetV2 1.0 without its classifier.'
        )
    return dict(zip(wanted, weights.values(), strict=True))
