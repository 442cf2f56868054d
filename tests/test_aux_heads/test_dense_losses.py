"""Losses are those of mmdet's ATSS head, without a read."""

import pytest
import torch
from dense_heads import build_reference, our_targets
from mmengine.structures import InstanceData
from reads import count_reads

from man_mm.aux_heads import dense_losses
from man_mm.aux_heads.dense_losses import box_losses, class_loss

STRIDES, CLASSES = [8, 16, 32], 5
SIZES = [(16, 16), (8, 8), (4, 4)]
SHAPES = [(128, 128), (100, 72)]
CODERS = {
    'plain': dict(type='DeltaXYWHBBoxCoder'),
    'scaled': dict(
        type='DeltaXYWHBBoxCoder',
        target_means=(0.1, 0.0, 0.0, 0.2),
        target_stds=(0.1, 0.1, 0.2, 0.2),
    ),
    'clamped': dict(type='DeltaXYWHBBoxCoder', add_ctr_clamp=True, ctr_clamp=4),
}


def batch(counts):
    rng = torch.Generator().manual_seed(0)
    found = []
    for count in counts:
        corners = 90 * torch.rand(count, 2, generator=rng) - 10
        sizes = 8 + 60 * torch.rand(count, 2, generator=rng)
        labels = torch.randint(CLASSES, (count,), generator=rng)
        boxes = torch.cat([corners, corners + sizes], 1)
        found.append(InstanceData(bboxes=boxes, labels=labels))
    return found


def predictions():
    rng = torch.Generator().manual_seed(1)
    return [
        [
            (3 * torch.randn(2, channels, *size, generator=rng)).requires_grad_()
            for size in SIZES
        ]
        for channels in (CLASSES, 4, 1)
    ]


def ours(head, instances, shapes=SHAPES):
    """The losses, and the gradients of their sum."""
    targets = our_targets(head, SIZES, instances, shapes)
    scores, offsets, centerness = maps = predictions()
    boxes, centers = box_losses(offsets, centerness, targets, head.bbox_coder)
    losses = dict(
        loss_cls=class_loss(scores, targets) / targets.count,
        loss_bbox=2 * boxes / targets.centerness.sum().clamp(min=1),
        loss_centerness=centers / targets.count,
    )
    sum(losses.values()).backward()
    return losses, [map_.grad for level in maps for map_ in level]


def theirs(head, instances):
    maps = predictions()
    metas = [dict(pad_shape=shape, img_shape=shape) for shape in SHAPES]
    losses = head.loss_by_feat(*maps, instances, metas)
    losses = {name: sum(levels) for name, levels in losses.items()}
    sum(losses.values()).backward()
    return losses, [map_.grad for level in maps for map_ in level]


def check(one, other):
    torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('counts', [(9, 4), (0, 3), (0, 0), (400, 1)], ids=str)
@pytest.mark.parametrize('coder', CODERS)
def test_losses_and_gradients_are_those_of_mmdet(coder, counts):
    head = build_reference(STRIDES, CLASSES, bbox_coder=CODERS[coder])
    expected = theirs(head, batch(counts))
    check(ours(head, batch(counts)), expected)
    assert all(expected[0][name] > 0 for name in expected[0]) == any(counts)
    assert all(grad.isfinite().all() for grad in expected[1])


@pytest.mark.parametrize('change', ['padding', 'coder', 'bound'])
def test_another_loss_is_found(change, monkeypatch):
    head = build_reference(STRIDES, CLASSES, bbox_coder=CODERS['plain'])
    expected, shapes = theirs(head, batch((9, 4))), SHAPES
    if change == 'padding':
        shapes = [SHAPES[0]] * 2
    elif change == 'coder':
        head.bbox_coder.stds = (1.0, 1.0, 1.0, 1.01)
    else:
        monkeypatch.setattr('man_mm.aux_heads.box_math._MAX_RATIO', 1.0)
    with pytest.raises(AssertionError):
        check(ours(head, batch((9, 4)), shapes), expected)


@pytest.mark.parametrize('padded', [True, False])
def test_gradcheck(padded):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=rng, dtype=torch.float64)
    labels = torch.randint(4, (2, 7), generator=rng)
    inside = (torch.rand(2, 7, generator=rng) < 0.5).double() if padded else None
    assert torch.autograd.gradcheck(
        lambda x: dense_losses._ClassLoss.apply(x, labels, inside),
        logits.requires_grad_(),
    )


def test_no_value_is_read():
    head = build_reference(STRIDES, CLASSES)
    objects = batch((9, 4))
    with count_reads() as reads:
        ours(head, objects)
    assert len(reads) == len(STRIDES)  # those of the helper
    with count_reads() as reads:
        theirs(head, objects)
    assert len(reads) > 30  # control
