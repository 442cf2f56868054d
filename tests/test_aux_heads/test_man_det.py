"""MANDetHead takes everything from the model, and trains by mmdet's own losses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    MMDET,
    batch_of,
    build_detector,
    build_wrapper,
    check_local_losses_fall,
    detector_config,
)
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import TASK_UTILS
from torch import nn

from man_mm.aux_heads.faithful_det import _copies
from man_mm.aux_heads.man_det import (
    anchor_scale,
    box_coder,
    find_levels,
    is_detector,
    model_strides,
    num_classes,
)
from man_mm.aux_heads.pyramid import Lateral, LocalPyramid
from man_mm.backbones import Tap
from man_mm.core.local_losses import total_loss


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
        return {name: sum(terms) for name, terms in seen.items() if 'loss' in name}

    quarter, one = first_losses(cls_weight=0.25), first_losses()
    assert set(one) == {'loss_cls', 'loss_bbox', 'loss_centerness'}
    ratios = {name: (one[name] / quarter[name]).item() for name in one}
    assert ratios.pop('loss_cls') == pytest.approx(4, rel=1e-6)
    assert set(ratios.values()) == {1.0}


def test_local_losses_fall(kind):
    model = build_detector(detector_config(kind, 18))
    check_local_losses_fall(model, batch_of(), steps=8)


@pytest.fixture(scope='module')
def retinanet():
    return build_detector(detector_config('retinanet', 18))


def with_generator(model, generator):
    """A copy of a detector with other priors; None for those of queries."""
    model = copy.copy(model)
    model._modules = dict(model._modules, bbox_head=copy.copy(model.bbox_head))
    if generator is None:
        del model.bbox_head.prior_generator
    else:
        model.bbox_head.prior_generator = TASK_UTILS.build(generator)
    return model


def test_strides_without_priors_are_those_behind_the_neck(retinanet):
    plain = with_generator(retinanet, None)
    assert model_strides(plain) == model_strides(retinanet) == [8, 16, 32, 64, 128]
    assert anchor_scale(plain) == 8 and box_coder(plain) is None
    plain.neck = None  # then those of the backbone
    assert model_strides(plain) == [4, 8, 16, 32]


def test_priors_of_other_kinds(retinanet):
    points = dict(type='mmdet.MlvlPointGenerator', strides=[8, 16], offset=0)
    model = with_generator(retinanet, points)
    assert (model_strides(model), anchor_scale(model)) == ([8, 16], 8.0)
    sizes = [[(64, 64), (128, 32)], [(64, 16), (4, 256)]]
    anchors = dict(type='mmdet.YOLOAnchorGenerator', strides=[32, 8], base_sizes=sizes)
    model = with_generator(retinanet, anchors)
    assert model_strides(model) == [32, 8]
    assert anchor_scale(model) == pytest.approx((2 * 2 * 4 * 4) ** 0.25)


@pytest.mark.parametrize(
    ('strides', 'levels'),
    [
        ([4, 8, 16, 32, 64], [8, 16, 32, 64]),
        ([32, 16, 8], [8, 16, 32]),
        ([8, 16, 32, 64, 100, 300], [8, 16, 32, 64, 128]),  # SSD
        ([8, 16, 32, 64, 128, 256, 512], [8, 16, 32, 64, 128]),
        ([32], [32]),
        ([4], [4]),
    ],
)
def test_levels(strides, levels):
    assert find_levels(strides) == levels


def test_classes_come_from_whichever_head_knows_them():
    def model(**heads):
        model = nn.Module()
        for name, attributes in heads.items():
            head = nn.Module()
            vars(head).update(attributes)
            setattr(model, name, head)
        return model

    assert num_classes(model(mask_head=dict(num_classes=5))) == 5
    panoptic = dict(num_classes=None, num_things_classes=80)
    assert num_classes(model(panoptic_head=panoptic)) == 80
    two_stage = model(rpn_head=dict(num_classes=1), roi_head={})
    row = nn.ModuleList([nn.Module(), nn.Module()])
    for classes, head in enumerate(row, start=7):
        head.num_classes = classes
    two_stage.roi_head.bbox_head = row
    assert num_classes(two_stage) == 7
    for other in (model(), model(head=dict(num_classes=5)), model(bbox_head={})):
        assert not is_detector(other)
        with pytest.raises(ValueError, match='trains detectors of mmdet'):
            num_classes(other)


def light(model):
    """The first light head, and maps for it to read."""
    head = build_wrapper(model).learner.heads[0]
    torch.manual_seed(1)
    (tap,) = head.detector.pyramid.sources.values()
    side = 64 // tap.stride
    return head, {tap.name: torch.randn(2, tap.channels, side, side)}


def targets(masks=False):
    batch = demo_mm_inputs(
        2, (3, 64, 64), num_items=[3, 3], num_classes=80, with_mask=masks
    )
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(pad_shape=(64, 64)))
    return batch['data_samples']


def test_the_loss_is_that_of_the_head_of_mmdet(retinanet):
    head, maps = light(retinanet)
    samples = targets()
    assert all(len(sample.ignored_instances) for sample in samples)
    ours = head(maps, samples, None)
    detector = head.detector
    theirs = detector.head.loss(tuple(detector.pyramid(maps)), samples)
    assert total_loss(ours) == total_loss(theirs)
    del samples[0].gt_instances  # control
    samples[0].gt_instances = samples[1].gt_instances
    assert total_loss(head(maps, samples, None)) != total_loss(ours)


def test_boxes_come_from_masks_where_there_are_masks_only(retinanet):
    head, maps = light(retinanet)
    both, masks_only = targets(masks=True), targets(masks=True)
    for sample, other in zip(both, masks_only, strict=True):
        instances = sample.gt_instances
        instances.bboxes = instances.masks.get_bboxes('hbox').tensor
        del other.gt_instances.bboxes
    loss = total_loss(head(maps, masks_only, None))
    assert loss == total_loss(head(maps, both, None))
    assert 'bboxes' not in masks_only[0].gt_instances  # left as it was
    both[0].gt_instances.bboxes += 9  # control
    assert loss != total_loss(head(maps, both, None))


def test_proposals_have_one_class():
    cfg = detector_config('retinanet', 18)
    cfg.model.bbox_head.num_classes = 1
    head, maps = light(build_detector(cfg))
    samples, same_class = targets(), targets()
    assert sum(int(sample.gt_instances.labels.sum()) for sample in samples)
    for sample in same_class:
        sample.gt_instances.labels.zero_()
    loss = total_loss(head(maps, samples, None))
    assert loss == total_loss(head(maps, same_class, None))
    head.detector.class_agnostic = False  # control
    assert loss != total_loss(head(maps, samples, None))


def test_targets_are_those_of_the_images_as_they_were_resized():
    """As in YOLOX, whose data preprocessor resizes the batch."""
    cfg = detector_config('retinanet', 18)
    resize = dict(type='BatchSyncRandomResize', random_size_range=(128, 128))
    cfg.model.data_preprocessor.batch_augments = [dict(resize, interval=1)]
    model = build_detector(cfg)
    wrapper = build_wrapper(model)
    MessageHub.get_current_instance().update_info('iter', 0)
    seen = []
    head = wrapper.learner.heads[0]
    forward = head.forward
    head.forward = lambda maps, samples, bank: (
        seen.append((copy.deepcopy(samples), maps['backbone.layer1.1'].shape))
        or forward(maps, samples, bank)
    )
    for _ in range(2):  # the first batch sets the size of the second
        model.train_step(batch_of(2, 64, 64), wrapper)
    (first, small), (second, large) = seen
    assert (small[-1], large[-1]) == (16, 32)
    for a, b in zip(first, second, strict=True):
        assert (a.img_shape, b.img_shape) == ((64, 64), (128, 128))
        torch.testing.assert_close(2 * a.gt_instances.bboxes, b.gt_instances.bboxes)


def other_backbone(**backbone):
    cfg = detector_config('retinanet', 18)
    cfg.model.backbone = backbone
    widths = [8, 16, 32, 64] if 'embed_dims' in backbone else [512, 1024]
    cfg.model.neck.update(in_channels=widths, start_level=0)
    return build_detector(cfg)


SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=[1] * 4,
    num_heads=[2] * 4,
    window_size=2,
)
SSD = dict(type='SSDVGG', depth=11, out_feature_indices=(14, 24))


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (SWIN, "those of SwinTransformer work on tokens: set aux_head.mode='light'"),
        (SSD, "between 'backbone.features.17' and 'backbone.features.24' channels or"),
    ],
)
def test_backbones_that_faithful_heads_cannot_copy(backbone, message):
    model = other_backbone(**backbone)
    with pytest.raises(ValueError, match=message):
        build_wrapper(model, aux_head=dict(mode='faithful'))
    build_wrapper(model)  # control


def test_a_neck_that_reads_something_else_than_ends_of_stages():
    model = build_detector(detector_config('retinanet', 18))
    forward = model.backbone.forward
    model.backbone.forward = lambda x: [map_[:, :3] for map_ in forward(x)]
    with pytest.raises(ValueError, match='ResNet returns maps .*no stage ends with'):
        build_wrapper(model, aux_head=dict(mode='faithful'))


def test_faithful_heads_keep_the_targets_as_they_are():
    """RTMDet-Ins replaces masks by tensors, which its own loss cannot read again."""
    samples = targets(masks=True)
    copies = _copies(samples)
    for sample in copies:
        sample.gt_instances.masks = torch.zeros(3, 64, 64)
        sample.gt_instances = sample.gt_instances[:1]
        sample.set_metainfo(dict(img_shape=(1, 1)))
    for before, after in zip(targets(masks=True), samples, strict=True):
        assert len(after.gt_instances) == 3
        assert (after.gt_instances.masks.masks == before.gt_instances.masks.masks).all()
        assert after.img_shape == before.img_shape == (64, 64)


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
        (dict(num_blocks=-1), 'aux_head.num_blocks must be at least 0'),
        (dict(mode='faithful', num_blocks=0), 'set aux_head.num_blocks=1'),
        (dict(mode='faithful', levels='own'), "aux_head.levels='all'"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        heads_with(**options)


def test_levels_that_no_map_reaches():
    coarse = Tap('a', 3, 8, 32)
    alone = LocalPyramid([coarse], [8, 16], channels=8)
    assert alone.levels == [32]
    (map_,) = alone({'a': torch.randn(2, 8, 3, 2)})
    assert map_.shape == (2, 8, 3, 2)


def test_finer_maps_than_the_finest_level_are_not_joined(monkeypatch):
    """A map of stride 1 or 2, as in SSD and YOLOv3, is large."""
    sizes = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, 'interpolate', lambda x, size: sizes.append(size) or interpolate(x, size)
    )
    pyramid = LocalPyramid([Tap('a', 0, 8, 2)], [8, 16], channels=8)
    maps = pyramid({'a': torch.randn(2, 8, 32, 32)})
    assert [map_.shape[-1] for map_ in maps] == [8, 4]
    assert sizes == [(8, 8)]
    sum(map_.sum() for map_ in maps).backward()
    assert all(param.grad is not None for param in pyramid.parameters())


def test_folded_statistics_equal_standardising_the_map():
    torch.manual_seed(0)
    lateral = Lateral(6, 4).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    by_hand = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(lateral(x, (mean, var)), lateral(by_hand))
    assert not torch.allclose(lateral(x), lateral(by_hand))  # control
