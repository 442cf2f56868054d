"""A loss that tells the classes of objects apart at their centers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CenterClassifier(nn.Module):
    """Classifies objects from the vectors of a map at their centers.

    A dense head asks of each location whether it has an object of a class, mostly
    not. This asks of each object which of the classes it has, and of nothing else.

    Args:
        channels: Channels C of the map.
        num_classes: Number of classes.

    Examples:
        >>> import torch
        >>> from man_mm.aux_heads.centers import CenterClassifier
        >>> centers = CenterClassifier(channels=4, num_classes=3)
        >>> boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0]])]
        >>> centers(torch.rand(1, 4, 8, 8), 8, boxes, [torch.tensor([2])]).shape
        torch.Size([])
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, num_classes)

    def forward(
        self,
        map_: Tensor,
        stride: int,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> Tensor:
        """The cross-entropy, summed over objects.

        Args:
            map_: Feature map ``(N, C, H, W)``.
            stride: Its stride in pixels.
            boxes: For each image the corners of its M objects in pixels, ``(M, 4)``.
            labels: Their classes ``(M,)``.
        """
        scores = self.classifier(at_centers(map_, stride, boxes))
        return F.cross_entropy(scores.float(), torch.cat([*labels]), reduction='sum')


def at_centers(map_: Tensor, stride: int, boxes: Sequence[Tensor]) -> Tensor:
    """The vectors of a map at the centers of boxes.

    Args:
        map_: Feature map ``(N, C, H, W)``.
        stride: Its stride in pixels.
        boxes: For each of N images the corners of M boxes in pixels, ``(M, 4)``.

    Returns:
        ``(M', C)``, of all boxes. A center outside of the map stands for its border.
    """
    rows, columns = map_.shape[2:]
    vectors = []
    for values, corners in zip(map_, boxes, strict=True):
        x, y = ((corners[:, :2] + corners[:, 2:]) / 2 // stride).long().unbind(1)
        vectors.append(values[:, y.clamp(0, rows - 1), x.clamp(0, columns - 1)].T)
    return torch.cat(vectors)
