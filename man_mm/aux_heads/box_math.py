"""Boxes ``(..., 4)`` as left, upper, right and lower side: what heads compute of them.

The formulas are those of mmdet, in its order of operations, without its reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MAX_RATIO = abs(math.log(16 / 1000))  # mmdet's bound of a box's size over its anchor's
_EPS = 1e-6


def centers(boxes: Tensor) -> Tensor:
    """Centers ``(..., 2)`` of boxes ``(..., 4)``."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def sides(points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """How far points ``(..., 2)`` lie inside of boxes ``(..., 4)``.

    Returns:
        Distances ``(..., 2)`` from the left and upper side, and to the right and
        lower one; negative outside.
    """
    return points - boxes[..., :2], boxes[..., 2:] - points


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union ``(...,)`` of boxes that broadcast ``(..., 4)``.

    Examples:
        >>> import torch
        >>> from man_mm.aux_heads.box_math import overlaps
        >>> overlaps(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
        tensor(0.3333)
    """
    common, union = _common_and_union(first, second)
    return common / union


def generalized_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Overlaps ``(...,)`` less the share of the box around both that neither fills."""
    common, union = _common_and_union(first, second)
    upper = torch.minimum(first[..., :2], second[..., :2])
    lower = torch.maximum(first[..., 2:], second[..., 2:])
    around = _area((lower - upper).clamp(min=0)).clamp(min=_EPS)
    return common / union - (around - union) / around


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points ``(..., 2)`` are in boxes ``(..., 4)``: 1 in the middle."""
    before, behind = sides(points, boxes)
    share = torch.minimum(before, behind) / torch.maximum(before, behind)
    return _area(share).sqrt()


def decode(anchors: Tensor, offsets: Tensor, coder: Any) -> Tensor:
    """Boxes ``(P, 4)`` that predictions say of anchors.

    Args:
        anchors: Anchors ``(P, 4)``.
        offsets: Predictions ``(P, 4)``.
        coder: The ``DeltaXYWHBBoxCoder`` of mmdet that says what they mean.
    """
    x, y, width, height = (
        column * std + mean
        for column, mean, std in zip(
            offsets.unbind(-1), coder.means, coder.stds, strict=True
        )
    )
    size = anchors[..., 2:] - anchors[..., :2]
    shift, growth = size * torch.stack([x, y], -1), torch.stack([width, height], -1)
    if coder.add_ctr_clamp:
        shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
        growth = growth.clamp(max=_MAX_RATIO)
    else:
        growth = growth.clamp(-_MAX_RATIO, _MAX_RATIO)
    center, half = centers(anchors) + shift, size * growth.exp() / 2
    return torch.cat([center - half, center + half], -1)


def _common_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    upper = torch.maximum(first[..., :2], second[..., :2])
    lower = torch.minimum(first[..., 2:], second[..., 2:])
    common = _area((lower - upper).clamp(min=0))
    areas = (_area(boxes[..., 2:] - boxes[..., :2]) for boxes in (first, second))
    return common, (sum(areas) - common).clamp(min=_EPS)


def _area(sizes: Tensor) -> Tensor:
    return sizes[..., 0] * sizes[..., 1]
