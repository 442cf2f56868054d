"""Which anchors learn which objects: ATSS, for all images of a batch at once.

After arXiv 1912.02424, with the same result as mmdet's ``ATSSAssigner``. Shapes follow
from the numbers of anchors and objects, and no value of a tensor is read, so that the
host of a GPU never waits. Distances between anchors and objects are the one thing that
grows with both: they are computed for some objects at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from man_mm.core.micro_batches import slices_of

from .box_math import centerness, centers, overlaps, sides

Size = tuple[int, int]
_TOPK = 9
_INSIDE = 0.01  # pixels from the side of an object to the center of an anchor
_SLICE = 2**20  # distances at a time: 4 MB


@dataclass(frozen=True)
class Level:
    """Anchors on a regular grid, one a location.

    Attributes:
        columns: Left and right side of the anchors of each column ``(W, 2)``.
        rows: Upper and lower side of those of each row ``(H, 2)``.
    """

    columns: Tensor
    rows: Tensor

    @property
    def size(self) -> Size:
        """Height and width of the grid."""
        return len(self.rows), len(self.columns)

    def boxes(self) -> Tensor:
        """The anchors ``(H * W, 4)``, row by row."""
        rows, columns = self.rows[:, None], self.columns[None]
        sides = torch.broadcast_tensors(
            columns[..., 0], rows[..., 0], columns[..., 1], rows[..., 1]
        )
        return torch.stack(sides, -1).flatten(0, 1)


@dataclass(frozen=True)
class Targets:
    """What the anchors of N images learn; A anchors an image, P places for positives.

    Attributes:
        labels: Class of each anchor ``(N, A)``; the number of classes for background.
        inside: 1 for the anchors on an image, 0 for those on its padding ``(N, A)``;
            None if there is no padding.
        positions: Anchors ``(P,)``, counted over all images, of which the first have
            an object. There are as many as could have one.
        is_positive: 1 for these, 0 for the others ``(P,)``.
        anchors: The anchors at these positions ``(P, 4)``.
        boxes: Their objects ``(P, 4)``, or the anchors themselves.
        centerness: How central they are in their objects ``(P,)``, 0 without one.
        count: How many have an object, at least one an image, a scalar.
    """

    labels: Tensor
    inside: Tensor | None
    positions: Tensor
    is_positive: Tensor
    anchors: Tensor
    boxes: Tensor
    centerness: Tensor
    count: Tensor


def make_level(
    size: Size, stride: int, base: Sequence[float], device: torch.device
) -> Level:
    """The anchors of a feature map.

    Args:
        size: Height and width of the map.
        stride: Pixels from one location to the next.
        base: Sides of the anchor at the first location.
        device: Where the anchors are needed.
    """
    height, width = (
        torch.arange(n, dtype=torch.float32, device=device) * stride for n in size
    )
    left, upper, right, lower = base
    return Level(
        torch.stack([width + left, width + right], -1),
        torch.stack([height + upper, height + lower], -1),
    )


@torch.no_grad()
def assign(
    levels: Sequence[Level],
    valid: Sequence[tuple[Size, ...]],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_classes: int,
) -> Targets:
    """Assigns the objects of a batch to anchors.

    Args:
        levels: The anchors, which all images share.
        valid: For each image, height and width of the part of each level that is not
            on padding.
        boxes: Boxes ``(M, 4)`` of the objects of each image.
        labels: Classes ``(M,)`` of these.
        num_classes: Number of classes.

    Examples:
        >>> import torch
        >>> from man_mm.aux_heads.atss import assign, make_level
        >>> level = make_level((2, 3), 8, (-8, -8, 8, 8), torch.device('cpu'))
        >>> boxes, labels = torch.tensor([[0.0, 0, 18, 15]]), torch.tensor([5])
        >>> assign([level], [((2, 3),)], [boxes], [labels], num_classes=80).labels
        tensor([[80, 80, 80, 80,  5, 80]])
    """
    anchors = torch.cat([level.boxes() for level in levels])
    num_images, num_anchors = len(boxes), len(anchors)
    # Images with the same padding follow one another, and are treated as one.
    order = sorted(range(num_images), key=valid.__getitem__)
    found = [
        _candidates(levels, anchors, region, list(images), boxes)
        for region, images in groupby(order, key=valid.__getitem__)
    ]
    owner = _owners(found, num_images * num_anchors)
    num_boxes = sum(map(len, boxes))
    is_positive = owner < num_boxes
    room = min(sum(overlap.numel() for _, overlap in found), len(owner))
    positions = _first(is_positive, room)
    is_filled = torch.arange(room, device=owner.device) < is_positive.sum()
    at = anchors[positions % num_anchors]
    # One more box, of class background, for anchors without an object.
    known = torch.cat([*(boxes[i] for i in order), anchors[:1]])
    classes = [labels[i] for i in order]
    classes = torch.cat([*classes, classes[0].new_full((1,), num_classes)])
    objects = torch.where(is_filled[:, None], known[owner[positions]], at)
    return Targets(
        labels=classes[owner].view(num_images, num_anchors),
        inside=_inside(levels, valid, anchors),
        positions=positions,
        is_positive=is_filled.to(anchors),
        anchors=at,
        boxes=objects,
        centerness=centerness(centers(at), objects) * is_filled,
        count=is_positive.view(num_images, -1).sum(1).clamp(min=1).sum(),
    )


def _candidates(
    levels: Sequence[Level],
    anchors: Tensor,
    region: tuple[Size, ...],
    images: list[int],
    boxes: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The anchors that may learn each of the B objects of some images, n for each.

    Returns:
        Their positions, counted over all images ``(n, B)``, and their overlaps, -1
        where they cannot learn it.
    """
    counts = [len(boxes[image]) for image in images]
    some = torch.cat([boxes[image] for image in images])
    near = _nearest(levels, region, some)
    at = anchors[near]
    overlap = overlaps(at, some)
    # Image by image, so that rounding does not depend on the others.
    parts = [part.contiguous() for part in overlap.split(counts, 1) if part.numel()]
    bounds = [part.mean(0) + part.std(0) for part in parts]
    bound = torch.cat(bounds) if bounds else overlap[0]
    depth = torch.cat(sides(centers(at), some), -1).amin(-1)
    is_positive = (overlap >= bound) & (depth > _INSIDE)
    first = [
        near.new_full((count,), image * len(anchors))
        for image, count in zip(images, counts, strict=True)
    ]
    return near + torch.cat(first), torch.where(is_positive, overlap, -1)


def _nearest(
    levels: Sequence[Level], region: tuple[Size, ...], boxes: Tensor
) -> Tensor:
    """The anchors whose centers are next to those of objects, a few of each level.

    Returns:
        Their positions in an image ``(n, B)``, for boxes ``(B, 4)``.
    """
    middle, found, first = centers(boxes), [], 0
    for level, (height, width) in zip(levels, region, strict=True):
        across = (level.columns[:width].sum(1) / 2 - middle[:, :1]).square()
        down = (level.rows[:height].sum(1) / 2 - middle[:, 1:]).square()
        count = min(_TOPK, height * width)
        nearest = []
        # Without objects there is one slice, which is empty.
        for some in slices_of(max(len(boxes), 1), max(_SLICE // (height * width), 1)):
            distances = (across[some, None] + down[some, :, None]).sqrt_().flatten(1)
            nearest.append(distances.topk(count, largest=False).indices)
        index = torch.cat(nearest)
        index = index // width * level.size[1] + index % width
        found.append((index + first).T)
        first += level.size[0] * level.size[1]
    return torch.cat(found)


def _owners(found: Sequence[tuple[Tensor, Tensor]], total: int) -> Tensor:
    """The object of each of ``total`` anchors, or the number of objects for none.

    An anchor of several objects gets that of the highest overlap, then the first.

    Args:
        found: Anchors ``(n, B)`` and their overlaps for some objects after the other.
        total: Number of anchors of all images.
    """
    counts = [overlap.shape[1] for _, overlap in found]
    numbers = torch.arange(sum(counts), device=found[0][0].device).split(counts)
    parts = [
        (anchor.flatten(), overlap.flatten(), number.expand_as(anchor).flatten())
        for (anchor, overlap), number in zip(found, numbers, strict=True)
    ]
    anchor, overlap, box = (torch.cat(part) for part in zip(*parts, strict=True))
    highest = overlap.new_full((total,), -1).scatter_reduce_(0, anchor, overlap, 'amax')
    wins = (overlap >= 0) & (overlap == highest[anchor])
    box = torch.where(wins, box, sum(counts))
    owner = box.new_full((total,), sum(counts))
    return owner.scatter_reduce_(0, anchor, box, 'amin')


def _first(is_positive: Tensor, room: int) -> Tensor:
    """The first ``room`` positions at which a mask is True, then zeros ``(room,)``."""
    slot = torch.where(is_positive, is_positive.cumsum(0) - 1, room)
    positions = torch.arange(len(slot), device=slot.device)
    return slot.new_zeros(room + 1).scatter_(0, slot, positions)[:room]


def _inside(
    levels: Sequence[Level], valid: Sequence[tuple[Size, ...]], anchors: Tensor
) -> Tensor | None:
    whole = tuple(level.size for level in levels)
    if all(region == whole for region in valid):
        return None
    inside = anchors.new_zeros(len(valid), len(anchors))
    parts = inside.split([height * width for height, width in whole], 1)
    for part, size, *regions in zip(parts, whole, *valid, strict=True):
        for image, (height, width) in enumerate(regions):
            part[image].view(size)[:height, :width] = 1
    return inside
