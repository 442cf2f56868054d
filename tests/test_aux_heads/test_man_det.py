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
    watch_gradients,
)
from mmengine.config import Config

from man_mm.aux_heads.detector import (
    anchor_scale,
    box_coder,
    model_strides,
)


def test_settings_come_from_the_model(kind):
    cfg = detector_config(kind, 18)
    head = cfg.model.bbox_head if kind == 'retinanet' else cfg.model.roi_head.bbox_head
    head.num_classes = 7
    model = build_detector(cfg)
    first = build_wrapper(model).learner.heads[0].detector
    assert first.head.num_classes == 7
    levels = [8, 16, 32, 64, 128] if kind == 'retinanet' else [8, 16, 32, 64]
    assert first.pyramid.levels == levels
    assert [s[0] for s in first.head.prior_generator.strides] == levels
    assert model_strides(model) == [4, *levels] or model_strides(model) == levels
    assert first.head.bbox_coder.stds == box_coder(model).stds
    expected = 8.0 if kind == 'faster_rcnn' else 4 * 2 ** (1 / 3)
    assert anchor_scale(model) == pytest.approx(expected)


@pytest.mark.parametrize('mode', ['light', 'faithful'])
def test_every_parameter_of_the_heads_learns(kind, mode):
    model = build_detector(detector_config(kind, 18))
    wrapper = build_wrapper(model, update='iteration', aux_head=dict(mode=mode))
    got = watch_gradients(wrapper, wrapper.learner.heads.named_parameters())
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


@pytest.mark.parametrize('head', ['MANDetHead', 'DGLDetHead'])
def test_cls_weight_scales_the_loss_for_classes_alone(kind, head):
    def first_losses(**options):
        torch.manual_seed(0)
        model = build_detector(detector_config(kind, 18))
        aux_head = dict(type=head, **options)
        wrapper = build_wrapper(model, bank=head == 'MANDetHead', aux_head=aux_head)
        seen = {}
        wrapper.learner.heads[0].register_forward_hook(
            lambda module, args, terms: seen.update(terms)
        )
        model.train_step(batch_of(), wrapper)
        return {name: loss for name, loss in seen.items() if 'loss' in name}

    quarter, one = first_losses(cls_weight=0.25), first_losses()
    assert set(one) == {'loss_cls', 'loss_bbox', 'loss_centerness'}
    ratios = {name: (one[name] / quarter[name]).item() for name in one}
    assert ratios.pop('loss_cls') == pytest.approx(4, rel=1e-6)
    assert set(ratios.values()) == {1.0}


def test_local_losses_fall(kind):
    model = build_detector(detector_config(kind, 18))
    check_local_losses_fall(model, batch_of(), steps=8)


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
    got = watch_gradients(wrapper, wrapper.learner.heads.named_parameters())
    assert torch.isfinite(model.train_step(batch_of(), wrapper)['loss'])
    assert got and all(has for _, has in got)


def test_the_own_level_reads_no_bank():
    for options, expected in (({}, True), (dict(levels='own'), False)):
        _, heads = heads_with(**options)
        assert any(head.needs_bank for head in heads) is expected
        assert any(head.reads for head in heads) is expected


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(mode='full'), "aux_head.mode must be one of .*got 'full'"),
        (dict(levels='one'), "aux_head.levels must be one of .*got 'one'"),
        (dict(channels=0), 'aux_head.channels must be at least 1'),
        (dict(num_blocks=-1), 'aux_head.num_blocks must be at least 0'),
        (dict(mode='faithful', num_blocks=0), 'set aux_head.num_blocks=1'),
        (dict(mode='faithful', levels='own'), "aux_head.levels='all'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        heads_with(**options)
