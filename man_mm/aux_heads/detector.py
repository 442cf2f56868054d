"""What the auxiliary heads of detectors share: the model's settings, a light head."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.backbones import find_outputs
from man_mm.core import MemoryBank

from .atss import Size, Targets, assign, make_level
from .base import AuxSite, in_full_precision
from .blocks import num_groups
from .dense_losses import box_losses, class_loss
from .pyramid import LocalPyramid

_FINEST_STRIDE = 8
_COARSEST_STRIDE = 128
_BOX_WEIGHT = 2.0


class LightDetector(nn.Module):
    """`LocalPyramid` and an ATSS head of mmdet; arguments as in `MANDetHead`.

    Targets and losses are those of mmdet too, written so that a GPU does not wait.
    """

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
        # Its parts are found in mmdet, whatever scope the caller is in.
        with root.DefaultScope.overwrite_default_scope('mmdet'):
            self.head = root.MODELS.build(
                dict(
                    type='mmdet.ATSSHead',
                    num_classes=classes,
                    in_channels=channels,
                    feat_channels=channels,
                    stacked_convs=num_convs,
                    norm_cfg=dict(type='GN', num_groups=num_groups(channels)),
                    anchor_generator=dict(
                        type='AnchorGenerator',
                        ratios=[1.0],
                        octave_base_scale=anchor_scale(site.model),
                        scales_per_octave=1,
                        strides=self.pyramid.levels,
                    ),
                )
            )
        self.head.init_weights()
        self.head.register_forward_hook(in_full_precision)
        self.cls_weight = cls_weight
        anchors = self.head.prior_generator.base_anchors
        self.anchors = [level.flatten().tolist() for level in anchors]
        if coder := box_coder(site.model):
            self.head.bbox_coder = copy.deepcopy(coder)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        scores, offsets, centerness = self.head(tuple(self.pyramid(maps, bank)))
        sizes = tuple(tuple(score.shape[-2:]) for score in scores)
        # Heads on the same grid have the same targets: assign them once a step.
        shared = {} if bank is None else bank.shared
        grid = (*zip(self.pyramid.levels, sizes, strict=True),)
        if grid not in shared:
            shared[grid] = self._assign(sizes, targets, scores[0].device)
        known = shared[grid]
        count, total = _average(known.count, known.centerness.sum())
        boxes, centers = box_losses(offsets, centerness, known, self.head.bbox_coder)
        return dict(
            loss_cls=self.cls_weight * class_loss(scores, known) / count,
            loss_bbox=_BOX_WEIGHT * boxes / total.clamp(min=1),
            loss_centerness=centers / count,
        )

    def _assign(
        self, sizes: tuple[Size, ...], targets: Any, device: torch.device
    ) -> Targets:
        boxes, labels = _ground_truth(targets, self.class_agnostic)
        strides = self.pyramid.levels
        levels = [
            make_level(*level, device)
            for level in zip(sizes, strides, self.anchors, strict=True)
        ]
        shapes = [sample.pad_shape for sample in targets]
        valid = [_without_padding(sizes, strides, shape) for shape in shapes]
        return assign(levels, valid, boxes, labels, self.head.num_classes)


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


def _average(*scalars: Tensor) -> Tensor:
    """Means ``(n,)`` of n scalars over all processes."""
    from mmdet.utils import reduce_mean

    return reduce_mean(torch.stack([x.float() for x in scalars]))


def _without_padding(
    sizes: Sequence[Size], strides: Sequence[int], shape: Sequence[int]
) -> tuple[Size, ...]:
    """The part of each level that an image of some height and width takes."""
    return tuple(
        tuple(min(math.ceil(x / stride), n) for x, n in zip(shape, size, strict=False))
        for size, stride in zip(sizes, strides, strict=True)
    )


def _ground_truth(
    targets: Sequence[Any], class_agnostic: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes ``(M, 4)`` and labels ``(M,)`` of the objects of each image.

    Boxes are those around the masks where there are masks only. Proposals of an RPN
    have one class, whatever the objects are.
    """
    boxes, labels = [], []
    for sample in targets:
        instances = sample.gt_instances
        classes = instances.labels
        if 'bboxes' in instances:
            boxes.append(instances.bboxes)
        else:
            around = instances.masks.get_bboxes('hbox').tensor
            boxes.append(around.to(classes.device))
        labels.append(torch.zeros_like(classes) if class_agnostic else classes)
    return boxes, labels


def find_levels(strides: list[int]) -> list[int]:
    """Powers of two that span the model's strides, from stride 8 to stride 128.

    Stride 4 would cost more than all other levels together, and beyond 128, where SSD
    has a single location, there is little to see.
    """
    first = max(min(strides), min(_FINEST_STRIDE, max(strides)))
    last = max(first, min(_COARSEST_STRIDE, max(strides)))
    exponents = range(round(math.log2(first)), round(math.log2(last)) + 1)
    return [2**exponent for exponent in exponents]
