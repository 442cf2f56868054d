"""Predicted peaks against measured ones, on real models that stay as they were."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    MMDET,
    RESTORERS,
    build_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    detector_config,
)
from mmengine.config import Config

from man_mm.aux_heads import AuxHead
from man_mm.backbones import find_units
from man_mm.core import LocalLearner, MemoryBank, split
from man_mm.engine import build_learner
from man_mm.measure.model_costs import measure_units
from man_mm.measure.peaks import predict
from man_mm.measure.planner import plan_modules
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.measure.unit_costs import measure_modules

torch.set_num_threads(1)

IMAGES = (2, 3, 96, 128)
PHOTOS = (8, 3, 64, 64)
SMALL = (2, 3, 16, 16)
HEAD = dict(type='MANHead')


def thin_detector(kind, depth, frozen=-1):
    """Neck and heads so small that not they alone set the peak."""
    cfg = detector_config(kind, depth, frozen)
    cfg.model.neck.out_channels = 32
    if kind == 'faster_rcnn':
        cfg.model.rpn_head.update(in_channels=32, feat_channels=32)
        cfg.model.roi_head.bbox_roi_extractor.out_channels = 32
        cfg.model.roi_head.bbox_head.in_channels = 32
        cfg.model.roi_head.bbox_head.num_classes = 4
        cfg.model.train_cfg.rcnn.sampler.num = 64
    else:
        cfg.model.bbox_head.update(
            in_channels=32, feat_channels=32, stacked_convs=1, num_classes=4
        )
    return build_detector(cfg)


def measure(model, shape, plain=False, **options):
    build = partial(build_learner, aux_head=HEAD, **options)
    return measure_units(model, build, shape, plain)


def real_peaks(model, shape, cuts, **options):
    model = copy.deepcopy(model)
    batch = synthetic_batch(model, shape)
    partition = dict(type='CutPartition', cuts=cuts)
    wrapper = build_wrapper(model, partition=partition, **options)
    model.train_step(batch, wrapper)  # makes the optimizer's state
    return measure_modules(wrapper.learner, lambda: model.train_step(batch, wrapper))


def check_plan(plan, peaks, tolerance=0.1):
    """The largest module within 10 %, as promised, and no other one far off."""
    assert abs(plan.peak / max(peaks) - 1) < tolerance
    for module, peak in zip(plan.modules, peaks, strict=True):
        assert abs(module.peak / peak - 1) < 2 * tolerance


MODELS = {
    'retinanet_r18': (lambda: thin_detector('retinanet', 18), IMAGES),
    'retinanet_r50': (lambda: thin_detector('retinanet', 50, frozen=1), IMAGES),
    'faster_rcnn_r18': (lambda: thin_detector('faster_rcnn', 18), IMAGES),
    'resnet50': (lambda: build_classifier(50), PHOTOS),
    **{name: (partial(build_restorer, name), SMALL) for name in RESTORERS},
}


@pytest.mark.parametrize('name', MODELS)
def test_predictions_hold(name):
    build, shape = MODELS[name]
    model = build()
    costs = measure(model, shape)
    for num_modules in (2, 4):
        plan = plan_modules(costs, num_modules)
        check_plan(plan, real_peaks(model, shape, plan.cuts))


@pytest.mark.parametrize('name', ['retinanet_r50', 'resnet50'])
def test_end_to_end_training_is_predicted(name):
    build, shape = MODELS[name]
    model = build()
    costs = measure(model, shape, plain=True)
    check_plan(predict(costs, [len(costs)]), real_peaks(model, shape, []))


@pytest.mark.parametrize(
    'options',
    [
        dict(micro_batch_size=2),
        dict(recompute=['backbone.layer1', 'backbone.layer2']),
    ],
)
def test_predictions_hold_with_what_saves_memory(options):
    model = build_classifier(50)
    plain = plan_modules(measure(model, PHOTOS), 3)
    costs = measure(model, PHOTOS, **options)
    plan = plan_modules(costs, 3)
    assert plan.peak < plain.peak
    check_plan(plan, real_peaks(model, PHOTOS, plan.cuts, **options))


def test_the_check_fails_for_other_predictions():
    model = build_classifier(18)
    costs = measure(model, PHOTOS)
    right, (*start, last) = plan_modules(costs, 3), PHOTOS
    peaks = real_peaks(model, PHOTOS, right.cuts)
    check_plan(right, peaks)
    smaller = measure(model, (*start, last * 3 // 4))
    no_heads = [type(c)(**{**vars(c), 'head': 0, 'head_grads': 0}) for c in costs]
    names = [cost.names[-1] for cost in costs]
    ends = [*(names.index(cut) + 1 for cut in right.cuts), len(names)]
    for other in (smaller, no_heads):
        with pytest.raises(AssertionError):
            check_plan(predict(other, ends), peaks)


class GreedyHead(AuxHead):
    """Reads every map that it can."""

    needs_bank = True

    def forward(self, maps, targets, bank):
        return sum(map_.mean() for map_ in maps.values())


def greedy_learner(model, partition):
    """A learner whose heads keep all maps of earlier modules in the bank."""
    modules = split(model, find_units(model), partition['cuts'])
    return LocalLearner(model, modules, [GreedyHead() for _ in modules[:-1]])


def test_maps_that_the_bank_keeps_are_counted():
    model = build_classifier(18)
    costs = measure_units(model, greedy_learner, PHOTOS)
    kept = {cost.names[-1].removeprefix('backbone.'): cost.kept for cost in costs}
    size = 8 * 16 * 16**2 * 4  # bytes of a map of layer1
    assert kept['maxpool'] == kept['layer1.0'] == size
    assert kept['layer1.1'] == 0  # a stage end, kept by any partition
    assert kept['layer2.0'] == size / 2
    plan = plan_modules(costs, 6)
    assert plan.modules[-2].kinds['held'] > costs[-2].held
    learner = greedy_learner(copy.deepcopy(model), dict(cuts=plan.cuts))
    learner.bank = MemoryBank()
    batch = synthetic_batch(model, PHOTOS)

    def backward(loss, _module, _complete):
        loss.backward()
        learner.model.zero_grad()

    def step():
        with learner.step(backward=backward):
            data = learner.model.data_preprocessor(batch, training=True)
            losses = learner.model(**data, mode='loss')
        backward(learner.model.parse_losses(losses)[0], None, True)

    check_plan(plan, measure_modules(learner, step))


def state_of(model):
    return dict(
        values={k: v.clone() for k, v in model.state_dict().items()},
        grads=[p.grad for p in model.parameters()],
        needs=[p.requires_grad for p in model.parameters()],
        modes=[module.training for module in model.modules()],
        hooks=sum(
            len(hooks)
            for module in model.modules()
            for name, hooks in vars(module).items()
            if name.endswith('hooks')
        ),
        attributes=[sorted(vars(module)) for module in model.modules()],
        rng=(torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]),
    )


def check_same(a, b):
    for key in ('needs', 'modes', 'hooks', 'attributes'):
        assert a[key] == b[key]
    assert all(torch.equal(v, b['values'][k]) for k, v in a['values'].items())
    assert all(x is y for x, y in zip(a['grads'], b['grads'], strict=True))
    assert torch.equal(a['rng'][0], b['rng'][0])
    assert a['rng'][1] == b['rng'][1]
    assert all(map(np.array_equal, a['rng'][2], b['rng'][2]))


def test_the_model_is_left_as_it_was():
    model = thin_detector('faster_rcnn', 18)
    param = next(model.parameters())
    param.grad = torch.ones_like(param)
    model.backbone.layer1.eval()
    before = state_of(model)
    costs = measure(model, IMAGES)
    check_same(before, state_of(model))
    # Control: a step on the model itself is noticed.
    wrapper = build_wrapper(model)
    model.train_step(synthetic_batch(model, IMAGES), wrapper)
    with pytest.raises(AssertionError):
        check_same(before, state_of(model))
    # Other weights, modes and random numbers: the same costs.
    assert measure(model, IMAGES) == costs


@pytest.mark.parametrize(('name', 'num_modules'), [('resnet50', 2), ('edsr', 3)])
def test_balanced_partition_in_a_config(name, num_modules):
    build, shape = MODELS[name]
    model = build()
    partition = dict(
        type='BalancedPartition', num_modules=num_modules, input_shape=shape
    )
    wrapper = build_wrapper(model, partition=partition)
    assert len(wrapper.learner.modules) == num_modules
    cuts = plan_modules(measure(model, shape), num_modules).cuts
    assert [module.cut for module in wrapper.learner.modules[:-1]] == list(cuts)
    logs = model.train_step(synthetic_batch(model, shape), wrapper)
    assert torch.isfinite(logs['loss'])


def test_a_budget_is_kept():
    model = build_classifier(50)
    costs = measure(model, PHOTOS)
    budget = plan_modules(costs, 3).peak
    assert plan_modules(costs, 2).peak > budget
    partition = dict(type='BalancedPartition', input_shape=list(PHOTOS))
    wrapper = build_wrapper(model, partition=dict(partition, memory_budget=budget))
    modules = wrapper.learner.modules
    assert len(modules) == 3
    peaks = real_peaks(model, PHOTOS, [module.cut for module in modules[:-1]])
    assert max(peaks) < 1.1 * budget
    wrapper = build_wrapper(model, partition=dict(partition, memory_budget='1GiB'))
    assert len(wrapper.learner.modules) == 1  # end-to-end training fits
    with pytest.raises(ValueError, match=r'memory_budget is 1024 bytes.* too many'):
        build_wrapper(model, partition=dict(partition, memory_budget='1KiB'))


def test_the_missing_shape_is_named():
    partition = dict(type='BalancedPartition', num_modules=2)
    with pytest.raises(ValueError, match=r'partition\.input_shape=\(2, 3, 800, 1333'):
        build_wrapper(build_classifier(18), partition=partition)


def test_too_many_modules_are_refused():
    model = build_classifier(18)
    model.backbone.layer1.requires_grad_(False)  # which is no module then
    partition = dict(type='BalancedPartition', num_modules=10, input_shape=PHOTOS)
    with pytest.raises(ValueError, match='num_modules is 10, but .* has 9 units'):
        build_wrapper(build_classifier(18), partition=partition)
    with pytest.raises(ValueError, match='num_modules is 10, but .* has 7 units'):
        build_wrapper(model, partition=partition)


def test_batches_have_masks_where_they_are_needed():
    cfg = Config.fromfile(MMDET / '.mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone.update(depth=18, init_cfg=None)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    batch = synthetic_batch(build_detector(cfg), (2, 3, 64, 96))
    assert [tuple(image.shape) for image in batch['inputs']] == [(3, 64, 96)] * 2
    for sample in batch['data_samples']:
        assert len(sample.gt_instances) == 8
        assert sample.gt_instances.masks.masks.shape == (8, 64, 96)


@pytest.mark.parametrize('scale', [2, 3])
def test_batches_of_restorers_have_targets_of_their_scale(scale):
    model = build_restorer('edsr', scale)
    batch, again = (synthetic_batch(model, (2, 3, 8, 12)) for _ in range(2))
    assert [image.shape for image in batch['inputs']] == [(3, 8, 12)] * 2
    targets = [sample.gt_img for sample in batch['data_samples']]
    assert [x.shape for x in targets] == [(3, 8 * scale, 12 * scale)] * 2
    assert all(map(torch.equal, batch['inputs'], again['inputs']))
    assert not torch.equal(*targets)


def test_batches_of_other_models_are_refused():
    with pytest.raises(ValueError, match='no synthetic batches for a Linear'):
        synthetic_batch(torch.nn.Linear(1, 1), (2, 3, 8, 8))
