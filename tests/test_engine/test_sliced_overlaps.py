"""Overlaps some boxes at a time: the same numbers, in less memory."""

import pytest
import torch
from conftest import batch_of, build_detector, build_wrapper, detector_config
from mmdet.models.task_modules import BboxOverlaps2D
from mmdet.structures.bbox import HorizontalBoxes
from torch.utils._pytree import tree_leaves

from man_mm.engine import sliced_overlaps
from man_mm.engine.sliced_overlaps import SlicedOverlaps, slice_overlaps
from man_mm.measure.memory import measure_memory


def boxes(count, seed):
    rng = torch.Generator().manual_seed(seed)
    corners = 100 * torch.rand(count, 2, generator=rng)
    sizes = 1 + 40 * torch.rand(count, 2, generator=rng)
    return torch.cat([corners, corners + sizes], 1)


@pytest.mark.parametrize('mode', ['iou', 'iof', 'giou'])
@pytest.mark.parametrize('counts', [(7, 300), (300, 7), (1, 300), (0, 300), (300, 0)])
@pytest.mark.parametrize('kind', [torch.Tensor, HorizontalBoxes])
def test_overlaps_are_equal(mode, counts, kind, monkeypatch):
    monkeypatch.setitem(sliced_overlaps._PAIRS, 'cpu', 100)
    plain, (a, b) = BboxOverlaps2D(), (boxes(n, n) for n in counts)
    if kind is HorizontalBoxes:
        a, b = kind(a), kind(b)
    found = SlicedOverlaps(plain)(a, b, mode)
    assert torch.equal(found, plain(a, b, mode)) and found.shape == counts
    assert not found.numel() or not torch.equal(found, plain(a, b, mode) + 1e-6)


def test_aligned_boxes_are_left_alone(monkeypatch):
    monkeypatch.setitem(sliced_overlaps._PAIRS, 'cpu', 1)
    a, b = boxes(9, 0), boxes(9, 1)
    plain = BboxOverlaps2D()
    aligned = SlicedOverlaps(plain)(a, b, is_aligned=True)
    assert torch.equal(aligned, plain(a, b, is_aligned=True))


def test_temporaries_are_those_of_a_slice():
    plain, (a, b) = BboxOverlaps2D(), (boxes(n, n) for n in (100, 20000))

    def peak(calculator):
        return measure_memory(lambda: calculator(a, b)).peak / (100 * 20000 * 4)

    assert peak(plain) > 5
    assert peak(SlicedOverlaps(plain)) < 2


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn', 'atss'])
def test_detectors_train_equally(kind, monkeypatch):
    monkeypatch.setitem(sliced_overlaps._PAIRS, 'cpu', 500)

    def losses(is_sliced):
        model = build_detector(detector_config(kind, 18))
        if is_sliced:
            slice_overlaps(model)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # samplers
            data = model.data_preprocessor(batch_of(2, 96, 96), True)
            return model(**data, mode='loss')

    plain, sliced = losses(False), losses(True)
    pairs = list(zip(tree_leaves(plain), tree_leaves(sliced), strict=True))
    assert len(pairs) > 1 and all(torch.equal(a, b) for a, b in pairs)


def test_a_wrapper_slices_once():
    model = build_detector(detector_config('faster_rcnn', 18))
    for _ in range(2):
        build_wrapper(model)
    for assigner in (model.rpn_head.assigner, model.roi_head.bbox_assigner):
        assert isinstance(assigner.iou_calculator, SlicedOverlaps)
        assert isinstance(assigner.iou_calculator.calculator, BboxOverlaps2D)
    other = build_detector(detector_config('retinanet', 18))
    build_wrapper(other, recompute_losses=False)
    assert isinstance(other.bbox_head.assigner.iou_calculator, BboxOverlaps2D)
