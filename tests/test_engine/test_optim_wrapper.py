"""Options of the wrapper and its constructor, on a small real detector."""

from contextlib import nullcontext

import pytest
import torch
from conftest import batch_of, build_detector, build_wrapper, detector_config

from man_mm.engine import constructor


@pytest.fixture
def model():
    return build_detector(detector_config('retinanet', 18))


def groups_of(wrapper):
    """Parameter groups of the model, and of the auxiliary heads."""
    heads = {id(p) for p in wrapper.learner.heads.parameters()}
    groups = wrapper.optimizer.param_groups
    ours = [id(group['params'][0]) in heads for group in groups]
    return (
        [g for g, is_ours in zip(groups, ours, strict=True) if not is_ours],
        [g for g, is_ours in zip(groups, ours, strict=True) if is_ours],
    )


def test_multipliers_of_the_auxiliaries(model):
    optimizer = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
    wrapper = build_wrapper(
        model, optimizer=optimizer, aux_lr_mult=0.5, aux_decay_mult=0.0
    )
    plain, ours = groups_of(wrapper)
    assert [(g['lr'], g['weight_decay']) for g in plain] == [(1e-3, 0.1)]
    assert [(g['lr'], g['weight_decay']) for g in ours] == [(5e-4, 0.0)]
    count = sum(len(g['params']) for g in ours)
    assert count == len(list(wrapper.learner.heads.parameters()))


def test_paramwise_rules_reach_the_auxiliaries(model):
    from mmengine.optim import build_optim_wrapper

    cfg = dict(
        type='LocalLearningOptimWrapper',
        constructor='LocalLearningOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
        paramwise_cfg=dict(norm_decay_mult=0.0),
        local_learning=dict(aux_lr_mult=2.0),
    )
    wrapper = build_optim_wrapper(model, cfg)
    _, ours = groups_of(wrapper)
    assert {g['weight_decay'] for g in ours} == {0.0, 0.1}
    assert {g['lr'] for g in ours} == {0.2}


def test_building_draws_no_random_numbers_of_the_run(model, monkeypatch):
    fork = torch.random.fork_rng

    def refuse(devices=None, **kwargs):
        assert devices is not None, 'touches all GPUs of the machine'
        return fork(devices, **kwargs)

    monkeypatch.setattr(torch.random, 'fork_rng', refuse)
    before = torch.get_rng_state()
    wrapper = build_wrapper(model)
    wrapper._measure((1, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(constructor, 'random_state_kept', nullcontext)
    build_wrapper(model)
    assert not torch.equal(torch.get_rng_state(), before)  # control


def test_frozen_stages_are_merged():
    model = build_detector(detector_config('retinanet', 18, frozen=1))
    wrapper = build_wrapper(model)
    cuts = [module.cut for module in wrapper.learner.modules[:-1]]
    assert cuts == ['backbone.layer2.1', 'backbone.layer3.1']
    before = model.backbone.layer1[0].conv1.weight.clone()
    model.train_step(batch_of(), wrapper)
    assert torch.equal(before, model.backbone.layer1[0].conv1.weight)


def test_scalars_reach_the_log(model):
    wrapper = build_wrapper(model)
    model.train_step(batch_of(), wrapper)
    scalars = wrapper.message_hub.log_scalars
    for index in (1, 2, 3):
        assert scalars[f'train/module{index}/loss'].current() > 0
    for index in (1, 2, 3, 4):
        assert scalars[f'train/module{index}/grad_norm'].current() > 0


@pytest.mark.parametrize('clip', ['module', 'global'])
def test_clipping(model, clip):
    wrapper = build_wrapper(
        model, clip_grad=dict(max_norm=1e-3), update='iteration', clip=clip
    )
    norms = []
    step = wrapper.optimizer.step

    def spy():
        for module in wrapper.learner.modules:
            grads = [
                p.grad for p in wrapper.learner.params(module) if p.grad is not None
            ]
            norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        step()

    wrapper.optimizer.step = spy
    model.train_step(batch_of(), wrapper)
    if clip == 'module':
        assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    else:
        assert max(norms) < 1e-3
        assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


def test_gradients_are_freed_module_by_module(model):
    wrapper = build_wrapper(model)
    alive = []
    finish = wrapper._finish

    def spy(module, update):
        finish(module, update)
        alive.append(sum(p.grad is not None for p in model.parameters()))

    wrapper._finish = spy
    model.train_step(batch_of(), wrapper)
    assert alive[:3] == [0, 0, 0]
    assert all(p.grad is None for p in model.parameters())


def test_state_round_trip(model):
    wrapper = build_wrapper(model)
    model.train_step(batch_of(), wrapper)
    state = wrapper.state_dict()
    other = build_wrapper(model)
    heads = other.learner.heads.state_dict().values()
    pairs = zip(heads, state['local_learning']['heads'].values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)  # control
    other.load_state_dict(state)
    heads = other.learner.heads.state_dict().values()
    pairs = zip(heads, state['local_learning']['heads'].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moments = zip(
        wrapper.learner.bank.moments(), other.learner.bank.moments(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in moments)


@pytest.mark.parametrize('depth', [18, 50])
def test_with_cp_gives_the_same_weights(depth):
    weights = []
    for with_cp in (False, True):
        cfg = detector_config('retinanet', depth)
        cfg.model.backbone.with_cp = with_cp
        model = build_detector(cfg)
        # Blocks that checkpoint themselves are not folded, which changes the rounding.
        wrapper = build_wrapper(model, efficient_conv_bn_eval=False)
        for _ in range(2):
            model.train_step(batch_of(), wrapper)
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
