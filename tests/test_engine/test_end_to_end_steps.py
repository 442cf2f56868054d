"""Exact and joint steps of real models, and the dial that turns to them."""

import pytest
import torch
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    labelled_images,
)
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from man_mm import MemoryBank
from man_mm.core import exact_steps
from man_mm.core.gradient_relay import injected
from man_mm.core.local_losses import local_loss, readers
from man_mm.core.partition import outlets

torch.set_num_threads(1)

SGD = dict(type='SGD', lr=1e-2, momentum=0.9, weight_decay=1e-4)


def build_swin():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[2] * 4),
        img_size=64,
        window_size=2,
        drop_path_rate=0.5,
    )
    head = dict(type='LinearClsHead', num_classes=10, in_channels=64)
    config = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=head,
        data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3),
    )
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


def build_small_detector(kind):
    cfg = detector_config(kind, 18, frozen=1)
    cfg.model.neck.out_channels = 16
    heads = [cfg.model.get('bbox_head'), cfg.model.get('rpn_head')]
    for head in filter(None, heads):
        head.update(in_channels=16, feat_channels=16)
    if kind == 'faster_rcnn':
        cfg.model.roi_head.bbox_roi_extractor.out_channels = 16
        cfg.model.roi_head.bbox_head.in_channels = 16
    return build_detector(cfg)


NETWORKS = {
    'resnet': (lambda: build_classifier(18), labelled_images),
    'swin': (build_swin, labelled_images),
    'retinanet': (lambda: build_small_detector('retinanet'), batch_of),
    'faster_rcnn': (lambda: build_small_detector('faster_rcnn'), batch_of),
    'edsr': (lambda: build_restorer('edsr'), image_pairs),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return request.param


def train(name, model, wrapper, steps=2, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        batch = NETWORKS[name][1]()
        logs = model.train_step(batch, wrapper)
    return logs


def plain(name, steps=2):
    model = NETWORKS[name][0]()
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=SGD))
    train(name, model, wrapper, steps)
    return model.state_dict()


def build_exact(name, **options):
    model = NETWORKS[name][0]()
    options = {'end_to_end_from': 0, 'efficient_conv_bn_eval': False, **options}
    return model, build_wrapper(model, optimizer=SGD, **options)


def exact(name, steps=2, **options):
    model, wrapper = build_exact(name, **options)
    train(name, model, wrapper, steps)
    return model.state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def close(a, b):
    return all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


@pytest.fixture(params=[True, False], ids=['twice', 'once'])
def last(request):
    """How often the last module runs."""
    return dict(recompute_last_module=request.param)


def test_exact_steps_are_plain_training(network, last):
    assert same(exact(network, **last), plain(network))


def test_a_boundary_gradient_that_is_scaled_is_found(network, last, monkeypatch):
    def scaled(tensors, grads):
        return injected(tensors, [1.01 * grad for grad in grads])

    monkeypatch.setattr(exact_steps, 'injected', scaled)
    assert not same(exact(network, steps=1, **last), plain(network, steps=1))


@pytest.mark.parametrize('update', ['iteration', 'parameter'])
@pytest.mark.parametrize('network', ['resnet', 'edsr'], indirect=True)
def test_the_time_of_the_update_changes_nothing(network, update, last):
    # The layer in front of EDSR's body waits for the global skip.
    assert same(exact(network, update=update, **last), exact(network))


@pytest.mark.parametrize(
    'name, options, again',
    [
        ('resnet', {}, False),
        ('retinanet', {}, True),
        ('edsr', {}, True),
        ('resnet', dict(micro_batch_size=1), True),
        ('resnet', dict(recompute_last_module=True), True),
        ('retinanet', dict(recompute_last_module=False), False),
    ],
)
def test_whether_the_last_module_runs_twice(name, options, again):
    _, wrapper = build_exact(name, **options)
    assert wrapper.dial.steps.recompute_last is again


def test_accumulation(steps=4):
    model = NETWORKS['resnet'][0]()
    config = dict(type='OptimWrapper', optimizer=SGD, accumulative_counts=2)
    train('resnet', model, build_optim_wrapper(model, config), steps)
    ours, wrapper = build_exact('resnet')
    wrapper._accumulative_counts = 2
    train('resnet', ours, wrapper, steps)
    assert same(ours.state_dict(), model.state_dict())


def test_clipping_by_the_norm_of_all_gradients():
    clip_grad = dict(max_norm=0.1)
    model = NETWORKS['resnet'][0]()
    config = dict(type='OptimWrapper', optimizer=SGD, clip_grad=clip_grad)
    train('resnet', model, build_optim_wrapper(model, config))
    ours = exact('resnet', clip_grad=clip_grad, clip='global', update='iteration')
    assert close(ours, model.state_dict())
    assert not close(ours, plain('resnet'))  # control


@pytest.mark.parametrize(
    'options, warns',
    [
        (dict(clip_grad=dict(max_norm=1)), True),
        (dict(), False),
        (
            dict(clip_grad=dict(max_norm=1), clip='global', update='iteration'),
            False,
        ),
        (dict(clip_grad=dict(max_norm=1), end_to_end_from=None), False),
    ],
)
def test_clipping_each_module_is_told(options, warns, caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    build_exact('resnet', **options)
    logger.removeHandler(caplog.handler)
    assert ("clip='global'" in caplog.text) == warns


def test_folding_and_recomputing_change_rounding_only():
    options = dict(efficient_conv_bn_eval=True, recompute=['backbone.layer3'])
    ours, theirs = exact('retinanet', **options), plain('retinanet')
    assert close(ours, theirs) and not same(ours, theirs)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_mixed_precision(dtype):
    def run(**options):
        model = NETWORKS['resnet'][0]()
        amp = dict(dtype=dtype, loss_scale=dict(init_scale=64.0))
        wrapper = build_wrapper(model, amp=amp, optimizer=SGD, **options)
        train('resnet', model, wrapper)
        return model.state_dict()

    # One module is plain mixed precision.
    one = dict(type='CutPartition', cuts=[])
    assert same(run(end_to_end_from=0), run(partition=one))
    assert not same(run(), run(partition=one))  # control: local steps


# Joint steps.


def weights_of(model, wrapper):
    heads = wrapper.learner.heads.state_dict(prefix='heads.')
    return {**model.state_dict(), **heads}


def loss_and_maps(model, units, data):
    """The model's loss; the map of each unit with its graph; what enters the first."""
    maps, entry, handles = {}, {}, []
    for unit in units:

        def keep(_m, args, output, unit=unit):
            maps[unit.name] = unit.map_of(output, args)

        end = model.get_submodule(unit.name)
        handles.append(end.register_forward_hook(keep))

    def enter(_m, args):
        entry['entry'] = args[0].detach()

    first = model.get_submodule(units[0].parts[0])
    handles.append(first.register_forward_pre_hook(enter))
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    for handle in handles:
        handle.remove()
    return loss, maps, entry


def summed(name, weight):
    """Plain training by the sum of the model's loss and weighted local losses."""
    model = NETWORKS[name][0]()
    wrapper = build_wrapper(model, optimizer=SGD, efficient_conv_bn_eval=False)
    learner, optimizer = wrapper.learner, wrapper.optimizer
    units = [unit for module in learner.modules for unit in module.units]
    for step in range(2):
        torch.manual_seed(step)
        data = model.data_preprocessor(NETWORKS[name][1](), training=True)
        loss, maps, earlier = loss_and_maps(model, units, data)
        # The bank learns of this step when it has ended.
        bank = MemoryBank()
        bank.load_state_dict(learner.bank.state_dict())
        for module, head in zip(learner.modules, learner.heads, strict=False):
            own = {name: maps[name] for name in outlets(module)}
            local = local_loss(head, own, earlier, data['data_samples'], bank)
            loss = loss + weight * local
            earlier.update({name: map_.detach() for name, map_ in own.items()})
        for key in earlier:
            if readers(learner.heads, key, -1):
                learner.bank.store(key, earlier[key])
        learner.bank.clear()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model, wrapper)


def joint(name, weight, **options):
    model, wrapper = build_exact(name, local_loss_weight=weight, **options)
    train(name, model, wrapper)
    return weights_of(model, wrapper), wrapper


def test_joint_steps_are_plain_training_of_the_summed_loss(network, last):
    ours, wrapper = joint(network, 0.05, **last)
    assert close(ours, summed(network, 0.05))
    assert not close(ours, summed(network, 0.0505))  # control
    assert len(wrapper.learner.losses) == len(wrapper.learner.heads)
    assert 'train/module1/loss' in wrapper.message_hub.log_scalars
