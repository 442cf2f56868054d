"""What the auxiliary heads of detectors share: the model's settings, a light head."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine import registry as root
from mmengine.structures import InstanceData
from torch import Tensor, nn

from man_mm.backbones import find_outputs
from man_mm.core import MemoryBank

from .base import AuxSite, in_full_precision
from .pyramid import LocalPyramid
from .sliced_assigner import SlicedAssigner

_FINEST_STRIDE = 8
_COARSEST_STRIDE = 128


class LightDetector(nn.Module):
    """`LocalPyramid` and an ATSS head of mmdet; arguments as in `MANDetHead`."""

    def __init__(
        self,
        site: AuxSite,
        channels: int,
        num_convs: int,
        cls_weight: float,
        num_blocks: int,
        levels: str,
        use_bank: bool,
    ) -> None:
        super().__init__()
        classes = num_classes(site.model)
        strides = find_levels(model_strides(site.model))
        if levels == 'own':
            strides = [max(site.own[-1].stride, strides[0])]
        maps = (*site.earlier, *site.own) if use_bank else site.own
        self.pyramid = LocalPyramid(maps, strides, channels, num_blocks)
        self.class_agnostic = classes == 1
        self.head = root.MODELS.build(
            dict(
                type='mmdet.ATSSHead',
                num_classes=classes,
                in_channels=channels,
                feat_channels=channels,
                stacked_convs=num_convs,
                norm_cfg=dict(type='GN', num_groups=math.gcd(8, channels)),
                anchor_generator=dict(
                    type='AnchorGenerator',
                    ratios=[1.0],
                    octave_base_scale=anchor_scale(site.model),
                    scales_per_octave=1,
                    strides=self.pyramid.levels,
                ),
                loss_cls=dict(
                    type='CrossEntropyLoss',
                    use_sigmoid=True,
                    loss_weight=cls_weight,
                ),
                loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
                train_cfg=dict(
                    assigner=dict(type='ATSSAssigner', topk=9),
                    allowed_border=-1,
                    pos_weight=-1,
                    debug=False,
                ),
            )
        )
        self.head.init_weights()
        self.head.assigner = SlicedAssigner(self.head.assigner)
        self.head.register_forward_hook(in_full_precision)
        self.assign = self.head.get_targets
        self.head.get_targets = self._get_targets
        self._shared: dict = {}
        if coder := box_coder(site.model):
            self.head.bbox_coder = copy.deepcopy(coder)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        self._shared = {} if bank is None else bank.shared
        predictions = self.head(tuple(self.pyramid(maps, bank)))
        objects, ignored, metas = _ground_truth(targets, self.class_agnostic)
        losses = self.head.loss_by_feat(*predictions, objects, metas, ignored)
        self._shared = {}  # nothing of a step may survive it
        return losses

    def _get_targets(self, anchors: list, *args: Any, **kwargs: Any) -> tuple:
        # Heads on the same grid have the same targets: assign them once a step.
        grid = tuple(len(level) for level in anchors[0])
        if grid not in self._shared:
            self._shared[grid] = self.assign(anchors, *args, **kwargs)
        return self._shared[grid]


def check_options(channels: int, num_convs: int, cls_weight: float) -> None:
    """Checks the options of `LightDetector`.

    Raises:
        ValueError: If one is out of range.
    """
    if channels < 1 or num_convs < 0 or cls_weight <= 0:
        raise ValueError(
            'aux_head.channels must be at least 1, aux_head.num_convs at least 0 and '
            f'aux_head.cls_weight above 0, got {channels}, {num_convs}, {cls_weight}.'
        )


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The heads of a detector that may know its classes, strides and anchors.

    Those of regions first, then those of locations and those of queries; of several
    heads in a row, as in Cascade R-CNN, the first. None for models of another kind.
    """
    places = [(getattr(model, 'roi_head', None), 'bbox_head')]
    names = ('bbox_head', 'rpn_head', 'mask_head', 'panoptic_head')
    places += [(model, name) for name in names]
    heads = [getattr(holder, name, None) for holder, name in places]
    heads = [x[0] if isinstance(x, nn.ModuleList) else x for x in heads]
    return [head for head in heads if isinstance(head, nn.Module)]


def is_detector(model: nn.Module) -> bool:
    """Whether a model detects objects of known classes, as those of mmdet do."""
    return _num_classes(model) is not None


def num_classes(model: nn.Module) -> int:
    """Number of classes of a detector.

    Raises:
        ValueError: If the model is none.
    """
    count = _num_classes(model)
    if count is None:
        raise ValueError(
            'MANDetHead trains detectors of mmdet with a roi_head, an rpn_head, a '
            'bbox_head, a mask_head or a panoptic_head that knows its num_classes, '
            f"not {type(model).__name__}: set aux_head.type='MANHead', which chooses."
        )
    return count


def model_strides(model: nn.Module) -> list[int]:
    """Strides in pixels of the levels that a detector predicts on.

    Those of its anchors or points, or of the maps that its heads read.
    """
    generator = _generator(model)
    if generator is None:
        return [tap.stride for tap in find_outputs(model, behind_neck=True)]
    return [s[0] if isinstance(s, tuple) else s for s in generator.strides]


def anchor_scale(model: nn.Module) -> float:
    """Anchor side in strides: the geometric mean over the model's own anchors.

    8, the scale of ATSS, for models without anchors.
    """
    generator = _generator(model)
    levels = getattr(generator, 'base_anchors', None)
    if levels is None:
        return 8.0
    scales = [
        (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt() / stride
        for anchors, stride in zip(levels, model_strides(model), strict=True)
    ]
    return float(torch.cat(scales).log().mean().exp())


def box_coder(model: nn.Module) -> nn.Module | None:
    """The coding of boxes of the model's dense head, if it codes offsets of anchors."""
    coders = [getattr(head, 'bbox_coder', None) for head in _dense_heads(model)]
    coders = [x for x in coders if type(x).__name__ == 'DeltaXYWHBBoxCoder']
    return coders[0] if coders else None


def _num_classes(model: nn.Module) -> int | None:
    counts = [
        getattr(head, key, None)
        for head in heads_of(model)
        for key in ('num_classes', 'num_things_classes')
    ]
    return next((count for count in counts if isinstance(count, int)), None)


def _dense_heads(model: nn.Module) -> list[nn.Module]:
    return [x for x in heads_of(model) if hasattr(x, 'prior_generator')]


def _generator(model: nn.Module) -> Any:
    """What makes the anchors or points of a dense head; None for other detectors."""
    return next((head.prior_generator for head in _dense_heads(model)), None)


def _ground_truth(
    targets: Sequence[Any], class_agnostic: bool
) -> tuple[list[Any], list[Any], list[dict]]:
    """Boxes with labels, boxes to ignore, and the description of each image.

    Boxes are those around the masks where there are masks only. Proposals of an RPN
    have one class, whatever the objects are.
    """
    from mmdet.models.utils import unpack_gt_instances

    found, ignored, metas = unpack_gt_instances(targets)
    objects = []
    for instances in found:
        labels = instances.labels
        if 'bboxes' in instances:
            boxes = instances.bboxes
        else:
            boxes = instances.masks.get_bboxes('hbox').tensor.to(labels.device)
        if class_agnostic:
            labels = torch.zeros_like(labels)
        objects.append(InstanceData(bboxes=boxes, labels=labels))
    return objects, ignored, metas


def find_levels(strides: list[int]) -> list[int]:
    """Powers of two that span the model's strides, from stride 8 to stride 128.

    Stride 4 would cost more than all other levels together, and beyond 128, where SSD
    has a single location, there is little to see.
    """
    first = max(min(strides), min(_FINEST_STRIDE, max(strides)))
    last = max(first, min(_COARSEST_STRIDE, max(strides)))
    exponents = range(round(math.log2(first)), round(math.log2(last)) + 1)
    return [2**exponent for exponent in exponents]
