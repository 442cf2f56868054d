"""MANDetHead takes everything from the model, and trains by mmdet's own losses."""

import pytest
import torch
from conftest import (
    MMDET,
    batch_of,
    build_detector,
    build_wrapper,
    check_local_losses_fall,
    detector_config,
)
from mmengine.config import Config

from man_mm.aux_heads.man_det import anchor_scale, dense_head, model_strides
from man_mm.aux_heads.pyramid import Lateral, LocalPyramid
from man_mm.backbones import Tap


def test_settings_come_from_the_model(kind):
    cfg = detector_config(kind, 18)
    head = cfg.model.bbox_head if kind == 'retinanet' else cfg.model.roi_head.bbox_head
    head.num_classes = 7
    model = build_detector(cfg)
    dense = dense_head(model)
    first = build_wrapper(model).learner.heads[0].detector
    assert first.head.num_classes == 7
    levels = [8, 16, 32, 64, 128] if kind == 'retinanet' else [8, 16, 32, 64]
    assert first.pyramid.levels == levels
    assert [s[0] for s in first.head.prior_generator.strides] == levels
    assert model_strides(dense) == [4, *levels] or model_strides(dense) == levels
    assert first.head.bbox_coder.stds == dense.bbox_coder.stds
    expected = 8.0 if kind == 'faster_rcnn' else 4 * 2 ** (1 / 3)
    assert anchor_scale(dense) == pytest.approx(expected)


@pytest.mark.parametrize('mode', ['light', 'faithful'])
def test_every_parameter_of_the_heads_learns(kind, mode):
    model = build_detector(detector_config(kind, 18))
    wrapper = build_wrapper(model, update='iteration', aux_head=dict(mode=mode))
    got = []
    wrapper._step = lambda modules: got.extend(
        (name, p.grad is not None)
        for name, p in wrapper.learner.heads.named_parameters()
    )
    logs = model.train_step(batch_of(), wrapper)
    assert torch.isfinite(logs['loss'])
    assert all(torch.isfinite(loss) for loss in wrapper.learner.losses.values())
    missing = [name for name, has in got if not has]
    assert not missing


@pytest.mark.parametrize('mode', ['light', 'faithful'])
def test_cuts_inside_a_stage(kind, mode):
    model = build_detector(detector_config(kind, 50))
    cuts = ['backbone.layer1.1', 'backbone.layer3.2']
    wrapper = build_wrapper(
        model, partition=dict(type='CutPartition', cuts=cuts), aux_head=dict(mode=mode)
    )
    model.train_step(batch_of(), wrapper)
    assert list(wrapper.learner.losses) == ['module1', 'module2']


def test_local_losses_fall(kind):
    model = build_detector(detector_config(kind, 18))
    check_local_losses_fall(model, batch_of(), steps=8)


def test_heads_share_their_targets():
    model = build_detector(detector_config('retinanet', 18))
    wrapper = build_wrapper(model)
    calls = []
    for head in wrapper.learner.heads:
        assign = head.detector._assign
        head.detector._assign = lambda *a, f=assign, **k: calls.append(1) or f(*a, **k)
    model.train_step(batch_of(), wrapper)
    model.train_step(batch_of(), wrapper)
    assert len(calls) == 2


def test_images_without_boxes_train_too(kind):
    model = build_detector(detector_config(kind, 18))
    wrapper = build_wrapper(model)
    batch = batch_of(2)
    for sample in batch['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    logs = model.train_step(batch, wrapper)
    assert torch.isfinite(logs['loss'])
    assert all(torch.isfinite(loss) for loss in wrapper.learner.losses.values())


def test_a_detector_without_a_neck():
    path = MMDET / '.mim/configs/faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = cfg.model.roi_head.shared_head.init_cfg = None
    model = build_detector(cfg)
    wrapper = build_wrapper(model)
    assert len(wrapper.learner.modules) == 2  # stem and layer1 are frozen
    assert wrapper.learner.heads[0].detector.pyramid.levels == [16]
    model.train_step(batch_of(1), wrapper)


def test_without_the_bank_finer_levels_are_left_out():
    taps = [Tap('a', 0, 8, 8), Tap('b', 1, 16, 16)]
    full = LocalPyramid(taps, [8, 16, 32], channels=8)
    alone = LocalPyramid(taps[1:], [8, 16, 32], channels=8)
    assert full.levels == [8, 16, 32] and alone.levels == [16, 32]
    maps = {'a': torch.randn(2, 8, 9, 7), 'b': torch.randn(2, 16, 5, 4)}
    shapes = [tuple(x.shape) for x in full(maps)]
    assert shapes == [(2, 8, 9, 7), (2, 8, 5, 4), (2, 8, 3, 2)]


def test_folded_statistics_equal_standardising_the_map():
    torch.manual_seed(0)
    lateral = Lateral(6, 4).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    by_hand = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(lateral(x, (mean, var)), lateral(by_hand))
    assert not torch.allclose(lateral(x), lateral(by_hand))  # control
