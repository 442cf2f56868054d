"""What the heads of detectors read from the model, and the light head of mmdet."""

import copy

import pytest
import torch
from conftest import (
    batch_of,
    build_detector,
    build_wrapper,
    detection_targets,
    detector_config,
)
from dense_heads import build_reference
from mmengine.logging import MessageHub
from mmengine.registry import TASK_UTILS, DefaultScope
from torch import nn

from man_mm.aux_heads import detector
from man_mm.aux_heads.detector import (
    anchor_scale,
    box_coder,
    find_levels,
    is_detector,
    model_strides,
    num_classes,
)
from man_mm.core.local_losses import total_loss


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


def reference_loss(detector, maps, samples):
    """The loss of mmdet's head with the weights of ours."""
    scale = detector.head.prior_generator.octave_base_scale
    reference = build_reference(
        detector.pyramid.levels, detector.head.num_classes, scale, channels=64
    )
    reference.load_state_dict(detector.head.state_dict())
    reference.bbox_coder = detector.head.bbox_coder
    return total_loss(reference.loss(tuple(detector.pyramid(maps)), samples))


def test_the_loss_is_that_of_the_head_of_mmdet(retinanet):
    head, maps = light(retinanet)
    samples = detection_targets()
    assert all(len(sample.ignored_instances) for sample in samples)
    ours = total_loss(head(maps, samples, None))
    theirs = reference_loss(head.detector, maps, samples)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    del samples[0].gt_instances  # control
    samples[0].gt_instances = samples[1].gt_instances
    assert abs(total_loss(head(maps, samples, None)) - theirs) > 1e-3 * theirs


def test_boxes_come_from_masks_where_there_are_masks_only(retinanet):
    head, maps = light(retinanet)
    both, masks_only = detection_targets(masks=True), detection_targets(masks=True)
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
    samples, same_class = detection_targets(), detection_targets()
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


@pytest.mark.parametrize('bank, calls', [(True, 2), (False, 3)])
def test_heads_on_the_same_levels_share_their_targets(bank, calls, monkeypatch):
    """By way of the bank; without it, each has its own."""
    model = build_detector(detector_config('retinanet', 18))
    wrapper = build_wrapper(model, bank=bank, aux_head=dict(use_bank=False))
    assert [len(head.detector.anchors) for head in wrapper.learner.heads] == [5, 5, 4]
    seen, assign = [], detector.assign
    monkeypatch.setattr(detector, 'assign', lambda *a: seen.append(1) or assign(*a))
    for step in (1, 2):
        model.train_step(batch_of(), wrapper)
        assert len(seen) == step * calls


def test_heads_are_built_in_any_scope():
    model = build_detector(detector_config('retinanet', 18))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        wrapper = build_wrapper(model)
    assert {type(head).__name__ for head in wrapper.learner.heads} == {'MANDetHead'}
