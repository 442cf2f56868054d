"""The dial: local steps first, and steps that are end to end from a share on."""

import logging

import pytest
import torch
from conftest import LOCAL_LEARNING, build_classifier, build_wrapper, labelled_images
from mmengine.logging import MMLogger
from short_runs import differences, different, train

torch.set_num_threads(1)

ADAMW = dict(type='AdamW', lr=1e-3)


def build(share, weight=0.0, iterations=4, **options):
    model = build_classifier(18)
    options.update(end_to_end_from=share, local_loss_weight=weight)
    wrapper = build_wrapper(model, optimizer=ADAMW, **options)
    wrapper.initialize_count_status(model, 0, iterations)
    return model, wrapper


def step(model, wrapper, steps=1):
    torch.manual_seed(wrapper._inner_count)
    for _ in range(steps):
        model.train_step(labelled_images(), wrapper)


@pytest.mark.parametrize('share', [0, 0.3, 0.5, 1.0, None])
def test_steps_are_local_until_their_share_is_done(share):
    model, wrapper = build(share, weight=0.1 if share is not None else 0.0)
    turned = []
    for _ in range(4):
        step(model, wrapper)
        turned.append(wrapper.dial.is_end_to_end)
    first = {0: 0, 0.3: 2, 0.5: 2, 1.0: 4, None: 4}[share]
    assert turned == [False] * first + [True] * (4 - first)


def test_exact_steps_free_heads_their_state_and_the_bank(caplog):
    model, wrapper = build(0.5)
    learner, optimizer = wrapper.learner, wrapper.optimizer
    heads = set(learner.heads.parameters())
    front = [p for module in learner.modules[:-1] for p in module.params]
    step(model, wrapper, 2)
    assert heads <= set(optimizer.state)
    groups = len(optimizer.param_groups)
    state = {p: optimizer.state[p]['step'].item() for p in learner.modules[-1].params}
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        step(model, wrapper)
    logger.removeHandler(caplog.handler)
    assert 'From iteration 3 on, steps are exact. The 3 auxiliary heads' in caplog.text
    assert not heads & set(optimizer.state) and not list(learner.heads)
    assert learner.bank is None and not learner.losses
    assert len(optimizer.param_groups) == groups  # schedulers count them
    # What the optimizer knew of the local losses is forgotten, the rest is not.
    assert {optimizer.state[p]['step'].item() for p in front} == {1}
    assert all(optimizer.state[p]['step'] == n + 1 for p, n in state.items())


def test_joint_steps_keep_the_heads():
    model, wrapper = build(0.5, weight=0.05)
    heads = list(wrapper.learner.heads.parameters())
    step(model, wrapper, 3)
    assert wrapper.learner.bank is not None
    assert {wrapper.optimizer.state[p]['step'].item() for p in heads} == {3}
    assert 'module1' in wrapper.learner.losses


def test_exact_steps_from_the_start_need_no_heads():
    model, wrapper = build(0)
    assert not list(wrapper.learner.heads)
    params = [p for group in wrapper.optimizer.param_groups for p in group['params']]
    assert set(params) == set(model.parameters())


def test_the_length_of_the_training_must_be_known():
    model = build_classifier(18)
    wrapper = build_wrapper(model, end_to_end_from=0.5)
    with pytest.raises(ValueError, match='end_to_end_from is a share of the training'):
        step(model, wrapper)


def test_accumulated_gradients_are_of_one_kind():
    model, wrapper = build(0.25)
    wrapper._accumulative_counts = 2
    step(model, wrapper, 2)
    assert not wrapper.dial.is_end_to_end  # in the middle of an update
    step(model, wrapper)
    assert wrapper.dial.is_end_to_end


# Resuming.


def settings(share=0.3, weight=0.0):
    local = dict(end_to_end_from=share, local_loss_weight=weight)
    wrapper = dict(LOCAL_LEARNING, optimizer=ADAMW, local_learning=local)
    return dict(optim_wrapper=wrapper, iters=6)


@pytest.mark.parametrize('weight', [0.0, 0.1, 'balanced'])
def test_resuming_across_the_change_is_bitwise(tmp_path, weight):
    whole = train(tmp_path / 'whole', **settings(weight=weight))
    for stop in (2, 5):  # it changes behind the second iteration
        work_dir = tmp_path / str(stop)
        stopped = train(work_dir, stop=stop, **settings(weight=weight))
        local = stopped['optimizer']['local_learning']
        assert local['end_to_end'] == (stop == 5)
        assert bool(local['heads']) == (stop == 2 or bool(weight))
        assert differences(whole, train(work_dir, **settings(weight=weight))) == []
    other = train(tmp_path / 'local', **settings(share=None))  # control
    assert different(whole['state_dict'], other['state_dict'])


def test_a_checkpoint_of_end_to_end_steps_is_not_resumed_by_local_ones():
    model, wrapper = build(0.5)
    step(model, wrapper, 3)
    _, local = build(None)
    with pytest.raises(ValueError, match='resume it with the .*end_to_end_from'):
        local.load_state_dict(wrapper.state_dict())
    _, same = build(0.5)  # control
    same.load_state_dict(wrapper.state_dict())
    assert same.dial.is_end_to_end and not list(same.learner.heads)
