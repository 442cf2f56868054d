"""Assigning objects to anchors in slices, for images with many objects."""

from __future__ import annotations

from typing import Any

import torch

# Objects at a time: with 20,000 anchors, 5 MB for each map of anchors and objects.
_SLICE = 64


class SlicedAssigner:
    """Runs an assigner of mmdet on some objects at a time, with the same result.

    Assigners compare all anchors with all objects, several times over, which with
    hundreds of objects takes more memory than the network does. Other than
    ``gpu_assign_thr`` of mmdet, which moves that to the CPU, this keeps it small.

    Args:
        assigner: One that treats each object by itself, and gives an anchor to the
            object with the highest overlap, as ``ATSSAssigner`` does.
    """

    def __init__(self, assigner: Any) -> None:
        self._assigner = assigner

    def assign(
        self,
        pred_instances: Any,
        num_level_priors: list[int],
        gt_instances: Any,
        gt_instances_ignore: Any = None,
    ) -> Any:
        """Assigns objects to anchors.

        Args:
            pred_instances: Instances with ``priors`` ``(A, 4)``.
            num_level_priors: Numbers of anchors of each level.
            gt_instances: Objects, with ``bboxes`` ``(M, 4)`` and ``labels`` ``(M,)``.
            gt_instances_ignore: Boxes to ignore. Defaults to None.

        Returns:
            An ``AssignResult`` of mmdet.
        """
        whole = None
        # With no objects there is one slice, which is empty.
        for start in range(0, max(len(gt_instances), 1), _SLICE):
            some = self._assigner.assign(
                pred_instances,
                num_level_priors,
                gt_instances[start : start + _SLICE],
                gt_instances_ignore,
            )
            some.gt_inds = torch.where(
                some.gt_inds > 0, some.gt_inds + start, some.gt_inds
            )
            if whole is None:
                whole = some
                continue
            better = some.max_overlaps > whole.max_overlaps
            for name in ('gt_inds', 'max_overlaps', 'labels'):
                new, old = getattr(some, name), getattr(whole, name)
                setattr(whole, name, torch.where(better, new, old))
        whole.num_gts = len(gt_instances)
        return whole
