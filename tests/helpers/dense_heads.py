"""mmdet's own ATSS head, which targets and losses of light heads must equal."""

import torch
from mmengine.registry import MODELS, init_default_scope

from man_mm.aux_heads.atss import assign, make_level


def build_reference(strides, classes, scale=8.0, cls_weight=1.0, channels=8, **options):
    """mmdet's head with the assigner and the losses that a light head had from it."""
    init_default_scope('mmdet')
    return MODELS.build(
        dict(
            type='mmdet.ATSSHead',
            num_classes=classes,
            in_channels=channels,
            feat_channels=channels,
            norm_cfg=dict(type='GN', num_groups=8),
            anchor_generator=dict(
                type='AnchorGenerator',
                ratios=[1.0],
                octave_base_scale=scale,
                scales_per_octave=1,
                strides=strides,
            ),
            loss_cls=dict(
                type='CrossEntropyLoss', use_sigmoid=True, loss_weight=cls_weight
            ),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
            train_cfg=dict(
                assigner=dict(type='ATSSAssigner', topk=9),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            **{'stacked_convs': 0, **options},
        )
    )


def reference_targets(head, sizes, instances, shapes, ignored=None):
    """Labels and their weights, boxes and theirs, ``(N, A, ...)``, and the count."""
    metas = [dict(pad_shape=shape, img_shape=shape) for shape in shapes]
    anchors, flags = head.get_anchors(sizes, metas, device='cpu')
    _, *targets, count = head.get_targets(anchors, flags, instances, metas, ignored)
    return *(torch.cat(levels, 1) for levels in targets), count


def our_targets(head, sizes, instances, shapes):
    """Those of this package, for the anchors of mmdet's head."""
    strides = [stride for stride, _ in head.prior_generator.strides]
    bases = [base.flatten().tolist() for base in head.prior_generator.base_anchors]
    levels = [
        make_level(*level, torch.device('cpu'))
        for level in zip(sizes, strides, bases, strict=True)
    ]
    valid = [
        tuple(
            (min(-(-shape[0] // stride), height), min(-(-shape[1] // stride), width))
            for stride, (height, width) in zip(strides, sizes, strict=True)
        )
        for shape in shapes
    ]
    boxes = [objects.bboxes for objects in instances]
    labels = [objects.labels for objects in instances]
    return assign(levels, valid, boxes, labels, head.num_classes)


def dense(targets):
    """Our targets in the form of mmdet's."""
    labels = targets.labels
    boxes, weights = torch.zeros(2, labels.numel(), 4)
    is_positive = targets.is_positive.bool()
    boxes[targets.positions[is_positive]] = targets.boxes[is_positive]
    weights[targets.positions[is_positive]] = 1
    inside = torch.ones(labels.shape) if targets.inside is None else targets.inside
    boxes, weights = (x.view(*labels.shape, 4) for x in (boxes, weights))
    return labels, inside, boxes, weights, targets.count
