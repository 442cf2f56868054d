"""Overlaps of many boxes with many anchors, some boxes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Pairs of boxes at a time. mmdet makes some fifty bytes of temporaries for each; on a
# CPU, those of a slice fit the cache.
_PAIRS = {'cpu': 2**17}
_PAIRS_ELSEWHERE = 2**22


class SlicedOverlaps:
    """Computes overlaps for the assigners of mmdet a few rows at a time.

    The overlaps are the same, bit for bit. Of an image with a hundred objects, the
    temporaries would take more memory than the network.

    Args:
        calculator: What computes the overlaps, such as mmdet's ``BboxOverlaps2D``.

    Examples:
        >>> import torch
        >>> from mmdet.models.task_modules import BboxOverlaps2D
        >>> from man_mm.engine.sliced_overlaps import SlicedOverlaps
        >>> anchors = 100 * torch.rand(10000, 4)
        >>> SlicedOverlaps(BboxOverlaps2D())(anchors[:100], anchors).shape
        torch.Size([100, 10000])
    """

    def __init__(self, calculator: Any) -> None:
        self.calculator = calculator

    def __call__(
        self, bboxes1: Any, bboxes2: Any, mode: str = 'iou', is_aligned: bool = False
    ) -> Tensor:
        """Overlaps ``(M, N)``, or ``(M,)`` if aligned.

        Args:
            bboxes1: Boxes ``(M, 4)``.
            bboxes2: Boxes ``(N, 4)``.
            mode: As the calculator takes it. Defaults to ``'iou'``.
            is_aligned: Whether each box meets one other only. Defaults to False.
        """
        count, others = len(bboxes1), len(bboxes2)
        pairs = _PAIRS.get(bboxes1.device.type, _PAIRS_ELSEWHERE)
        if is_aligned or count * others <= pairs:
            return self.calculator(bboxes1, bboxes2, mode, is_aligned)
        rows = max(1, pairs // others)
        out = None
        for start in range(0, count, rows):
            some = self.calculator(bboxes1[start : start + rows], bboxes2, mode)
            if out is None:
                out = some.new_empty(count, others)
            out[start : start + rows] = some
        return out

    def __repr__(self) -> str:
        return f'SlicedOverlaps({self.calculator!r})'


def slice_overlaps(*modules: nn.Module) -> None:
    """Gives the assigners of detectors `SlicedOverlaps`.

    Args:
        *modules: What has the assigners.
    """
    for module in modules:
        for part in module.modules():
            for assigner in _assigners(part):
                if not isinstance(assigner.iou_calculator, SlicedOverlaps):
                    assigner.iou_calculator = SlicedOverlaps(assigner.iou_calculator)


def _assigners(part: nn.Module) -> Iterator[Any]:
    for value in vars(part).values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(one, dict) and hasattr(one, 'iou_calculator'):
                yield one
