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


def heads_with(**options):
    model = build_detector(detector_config('retinanet', 18))
    return model, build_wrapper(model, aux_head=dict(**options)).learner.heads


@pytest.mark.parametrize(
    'options, counts',
    [
        ({}, [(5, 5), (4, 5), (3, 5)]),  # control
        (dict(num_blocks=2), [(10, 5), (8, 5), (6, 5)]),
        (dict(num_blocks=0), [(0, 5), (0, 5), (0, 5)]),
        (dict(levels='own'), [(1, 1), (0, 1), (0, 1)]),
        (dict(use_bank=False), [(5, 5), (4, 5), (3, 4)]),
    ],
)
def test_convolutions_of_the_slm_and_levels(options, counts):
    model, heads = heads_with(**options)
    pyramids = [head.detector.pyramid for head in heads]
    convs = [
        sum(isinstance(x, torch.nn.Conv2d) for x in p.slm.modules()) for p in pyramids
    ]
    assert list(zip(convs, (len(p.levels) for p in pyramids), strict=True)) == counts
    assert [p.levels[0] for p in pyramids] == [
        8,
        8,
        16 if options in (dict(levels='own'), dict(use_bank=False)) else 8,
    ]


@pytest.mark.parametrize(
    'options', [dict(num_blocks=0), dict(num_blocks=2), dict(levels='own')]
)
def test_heads_of_all_options_learn(kind, options):
    model = build_detector(detector_config(kind, 18))
    wrapper = build_wrapper(model, aux_head=options, update='iteration')
    got = []
    wrapper._step = lambda modules: got.extend(
        (name, p.grad is not None)
        for name, p in wrapper.learner.heads.named_parameters()
    )
    assert torch.isfinite(model.train_step(batch_of(), wrapper)['loss'])
    assert got and all(has for _, has in got)


def test_the_own_level_reads_no_bank():
    for options, expected in (({}, True), (dict(levels='own'), False)):
        _, heads = heads_with(**options)
        assert any(head.needs_bank for head in heads) is expected
        assert any(head.reads for head in heads) is expected


def test_without_an_slm_coarser_levels_are_pooled():
    taps = [Tap('a', 0, 8, 8)]
    pooled = LocalPyramid(taps, [8, 16, 32], channels=8, num_blocks=0)
    learned = LocalPyramid(taps, [8, 16, 32], channels=8)
    maps = {'a': torch.randn(2, 8, 9, 7)}
    shapes = [tuple(x.shape) for x in learned(maps)]
    assert [tuple(x.shape) for x in pooled(maps)] == shapes
    assert shapes[-1] == (2, 8, 3, 2)
    assert not list(pooled.slm.parameters()) and list(learned.slm.parameters())


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(mode='full'), "aux_head.mode must be one of .*got 'full'"),
        (dict(levels='one'), "aux_head.levels must be one of .*got 'one'"),
        (dict(channels=0), 'aux_head.channels must be at least 1'),
        (dict(num_blocks=-1), 'aux_head.num_blocks at least 0'),
        (dict(mode='faithful', num_blocks=0), 'set aux_head.num_blocks=1'),
        (dict(mode='faithful', levels='own'), "aux_head.levels='all'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        heads_with(**options)


def test_folded_statistics_equal_standardising_the_map():
    torch.manual_seed(0)
    lateral = Lateral(6, 4).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    by_hand = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(lateral(x, (mean, var)), lateral(by_hand))
    assert not torch.allclose(lateral(x), lateral(by_hand))  # control
