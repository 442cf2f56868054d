"""Targets are those of mmdet's ATSS head, in few operations and without a read."""

import pytest
import torch
from dense_heads import build_reference, dense, our_targets, reference_targets
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData
from reads import count_operators, count_reads

from man_mm.aux_heads import atss
from man_mm.measure.memory import measure_memory

STRIDES, CLASSES = [8, 16, 32], 5
NAMES = ('labels', 'label weights', 'boxes', 'box weights', 'count')


@pytest.fixture(scope='module')
def head():
    return build_reference(STRIDES, CLASSES, scale=4 * 2 ** (1 / 3))


def instances(boxes, labels=None):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    if labels is None:
        labels = torch.arange(len(boxes)) % CLASSES
    return InstanceData(bboxes=boxes, labels=labels)


def crowd(count, side=200, seed=0):
    rng = torch.Generator().manual_seed(seed)
    corners = side * torch.rand(count, 2, generator=rng)
    sizes = 4 + side / 2 * torch.rand(count, 2, generator=rng)
    return instances(torch.cat([corners, corners + sizes], 1))


def both(head, batch, shapes, ignored=None):
    """Targets of mmdet's head and ours, for images padded to the largest of them."""
    height, width = (max(side) for side in zip(*shapes, strict=True))
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    theirs = reference_targets(head, sizes, batch, shapes, ignored)
    return theirs, dense(our_targets(head, sizes, batch, shapes))


def differing(theirs, ours):
    pairs = zip(NAMES, theirs, ours, strict=True)
    return [name for name, a, b in pairs if not torch.equal(torch.as_tensor(a), b)]


def some_box(fraction):
    """A box of any place, in or beyond the image, on a grid on which distances tie."""
    place, size = st.integers(-40, 120), st.integers(1, 160)
    sides = st.tuples(place, place, size, size)
    return sides.map(
        lambda s: [x / fraction for x in (s[0], s[1], s[0] + s[2], s[1] + s[3])]
    )


# Boxes repeat, so that overlaps tie too.
some_objects = st.sampled_from([1, 2, 3]).flatmap(
    lambda fraction: st.lists(some_box(fraction), max_size=8).flatmap(
        lambda boxes: st.sampled_from([boxes, boxes + boxes[::-1]])
    )
)
some_shape = st.tuples(st.integers(1, 104), st.integers(1, 104))
some_batch = st.lists(st.tuples(some_objects, some_shape), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch=some_batch)
def test_targets_are_those_of_mmdet(head, batch):
    objects = [instances(boxes) for boxes, _ in batch]
    shapes = [shape for _, shape in batch]
    assert not differing(*both(head, objects, shapes))


@pytest.mark.parametrize('rows', [1, 7, 10**6])
def test_slices_change_nothing(head, monkeypatch, rows):
    monkeypatch.setattr(atss, '_SLICE', rows * 26 * 26)
    batch = [crowd(300), crowd(0), crowd(65, seed=1)]
    theirs, ours = both(head, batch, [(208, 208), (200, 160), (208, 208)])
    assert not differing(theirs, ours)
    assert ours[-1] > 100


@pytest.mark.parametrize('rule', [dict(_TOPK=8), dict(_INSIDE=4.0)])
def test_another_rule_is_found(head, monkeypatch, rule):
    for name, value in rule.items():
        monkeypatch.setattr(atss, name, value)
    theirs, ours = both(head, [crowd(30)], [(208, 208)])
    assert differing(theirs, ours) == ['labels', 'boxes', 'box weights', 'count']


def test_padding_that_is_ignored_is_found(head):
    batch, sizes = [crowd(30), crowd(30)], [(26, 26), (13, 13), (7, 7)]
    theirs = reference_targets(head, sizes, batch, [(208, 208), (96, 120)])
    ours = dense(our_targets(head, sizes, batch, [(208, 208), (208, 208)]))
    assert 'label weights' in differing(theirs, ours)


def test_boxes_to_ignore_are_background(head, monkeypatch):
    """As in mmdet, whose ``ignore_iof_thr`` is -1 by default."""
    batch, ignored = [crowd(20)], [crowd(20, seed=1)]
    assert not differing(*both(head, batch, [(208, 208)], ignored))
    monkeypatch.setattr(head.assigner, 'ignore_iof_thr', 0.5)  # control
    assert differing(*both(head, batch, [(208, 208)], ignored))


def test_no_value_is_read(head):
    batch, shapes = [crowd(30), crowd(0)], [(208, 208), (96, 120)]
    sizes = [(26, 26), (13, 13), (7, 7)]
    with count_reads() as reads:
        our_targets(head, sizes, batch, shapes)
    assert len(reads) == len(STRIDES)  # those of the helper
    with count_reads() as reads:
        reference_targets(head, sizes, batch, shapes)
    assert len(reads) > 20  # control


def test_operations_do_not_grow_with_images(head):
    sizes, shape = [(26, 26), (13, 13), (7, 7)], (208, 208)

    def operations(run, images):
        with count_operators() as counted:
            run(head, sizes, [crowd(5)] * images, [shape] * images)
        return len(counted)

    assert operations(our_targets, 8) < operations(our_targets, 1) + 6 * 7
    plain = [operations(reference_targets, images) for images in (1, 8)]
    assert plain[1] > plain[0] + 100 * 7  # control


def test_memory_an_object_does_not_depend_on_anchors(head, monkeypatch):
    sizes, shape = [(26, 26), (13, 13), (7, 7)], (208, 208)

    def peak(run, count):
        batch = [crowd(count)]
        return measure_memory(lambda: run(head, sizes, batch, [shape])).peak

    def growth(run):
        few, many = (peak(run, count) for count in (64, 1024))
        return (many - few) / 960

    monkeypatch.setattr(atss, '_SLICE', 64 * 26 * 26)
    assert growth(our_targets) < 2**11 < 2**14 < growth(reference_targets)  # control
    monkeypatch.setattr(atss, '_SLICE', 1024 * 26 * 26)
    assert growth(our_targets) > 1.5 * 2**11  # control
