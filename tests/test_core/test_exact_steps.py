"""Exact and joint steps on small networks, against plain back-propagation."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from networks import (
    IMAGES,
    LABELS,
    WIDTH,
    PooledHead,
    all_params,
    build,
    build_global_skip,
    build_model,
    count_hooks,
    equal,
    model_loss,
    stage,
)
from torch import nn

from man_mm.core import ExactSteps, LocalLearner, MemoryBank, Unit, second_runs, split
from man_mm.core import exact_steps as module_under_test
from man_mm.core.gradient_relay import injected
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)


def grads_of(params):
    return [param.grad for param in params]


def plain(model, loss_of=model_loss):
    """Gradients, loss and state of plain back-propagation."""
    torch.manual_seed(3)
    loss = loss_of(model)
    loss.backward()
    return grads_of(model.parameters()), loss, model.state_dict(), torch.rand(1)


def exact(learner, loss_of=model_loss, weight=0.0, backward=None, recompute_last=True):
    steps = ExactSteps(learner, weight, recompute_last)
    torch.manual_seed(3)
    with steps.step(LABELS):
        loss = loss_of(learner.model)
    loss.backward()
    steps.replay(backward)
    model = learner.model
    return grads_of(model.parameters()), loss, model.state_dict(), torch.rand(1)


def check_exact(learner, loss_of=model_loss, recompute_last=True):
    expected = plain(copy.deepcopy(learner.model), loss_of)
    assert equal(exact(learner, loss_of, recompute_last=recompute_last), expected)


def check_close(grads, others, rtol=1e-9):
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-15)


class Neck(nn.Module):
    """Reads the ends of all stages, and the last two once more."""

    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(stage(WIDTH if i else 2) for i in range(depth))
        self.laterals = nn.ModuleList(nn.Conv2d(WIDTH, 3, 1) for _ in range(depth))

    def forward(self, x):
        maps = [x := block(x) for block in self.stages]
        maps += maps[-2:]
        laterals = [*self.laterals, *self.laterals[:2]]
        pairs = zip(maps, laterals, strict=True)
        return sum(lateral(map_).mean((2, 3)) for map_, lateral in pairs)


def build_neck(cuts=('stages.1',)):
    model = Neck()
    units = [Unit(f'stages.{i}', i) for i in range(4)]
    heads = [PooledHead(2) for _ in cuts]
    return LocalLearner(model, split(model, units, cuts), heads)


@pytest.fixture(params=[True, False], ids=['twice', 'once'])
def recompute_last(request):
    """How often the last module runs."""
    return request.param


@pytest.mark.parametrize('depth', [1, 2, 4])
def test_an_exact_step_is_plain_back_propagation(depth, recompute_last):
    learner = build(depth)
    check_exact(learner, recompute_last=recompute_last)
    assert count_hooks(learner.model) == 0
    assert all(p.grad is None for p in learner.heads.parameters())


@pytest.mark.parametrize('cuts', [['stages.0'], ['stages.1'], ['stages.2']])
def test_gradients_of_several_readers_are_summed(cuts, recompute_last):
    check_exact(build_neck(cuts), recompute_last=recompute_last)


@pytest.mark.parametrize('again', [True, False])
def test_how_often_the_last_module_runs(again):
    learner = build(3)
    runs = []
    learner.model.stage3.register_forward_hook(lambda *_: runs.append(3))
    learner.model.stage2.register_forward_hook(lambda *_: runs.append(2))
    exact(learner, recompute_last=again)
    assert runs == [2, 3, *[3] * again, 2]


def test_a_boundary_gradient_that_is_scaled_is_found(monkeypatch, recompute_last):
    def scaled(tensors, grads):
        return injected(tensors, [1.01 * grad for grad in grads])

    monkeypatch.setattr(module_under_test, 'injected', scaled)
    with pytest.raises(AssertionError):
        check_exact(build(3), recompute_last=recompute_last)


def test_statistics_that_are_updated_twice_are_found(monkeypatch):
    monkeypatch.setattr(second_runs, 'statistics_kept', lambda *_: nullcontext())
    with pytest.raises(AssertionError):
        check_exact(build(3))


def build_dropout():
    model = build_model(3)
    for block in list(model)[:3]:
        block.append(nn.Dropout(0.5))
    return build(3, model=model)


def test_both_runs_drop_the_same(recompute_last):
    check_exact(build_dropout(), recompute_last=recompute_last)


def test_runs_that_drop_other_maps_are_found(monkeypatch):
    monkeypatch.setattr(second_runs.RandomState, 'restore', lambda self: None)
    with pytest.raises(AssertionError):
        check_exact(build_dropout())


def test_frozen_parts_in_front_run_once():
    learner = build(4, ['stage3'])
    model = learner.model
    model.stage1.requires_grad_(False)
    model.stage2.requires_grad_(False)
    modules = split(model, [u for m in learner.modules for u in m.units], ['stage3'])
    runs = []
    model.stage2.register_forward_hook(lambda *_: runs.append(2))
    model.stage3[0].register_forward_hook(lambda *_: runs.append(3))
    check_exact(LocalLearner(model, modules, learner.heads))
    assert runs == [2, 3] + [2, 3, 3]  # of the copy, and of the learner


@pytest.mark.parametrize('depth', [2, 3])
def test_a_global_skip(depth, recompute_last):
    learner = build_global_skip(depth)

    def loss_of(model):
        return F.cross_entropy(model(IMAGES.double()), LABELS)

    check_exact(learner, loss_of, recompute_last)


def test_each_module_is_complete_once_and_in_reverse_order():
    calls = []

    def backward(loss, module, complete):
        loss.backward()
        calls.append((module.name, complete))

    exact(build(3), backward=backward)
    assert calls == [('module3', True), ('module2', True), ('module1', True)]
    calls.clear()
    loss_of = lambda model: F.cross_entropy(model(IMAGES.double()), LABELS)  # noqa: E731
    exact(build_global_skip(2), loss_of, backward=backward)
    # The layer in front of the body is the last module's.
    assert calls == [('module2', False), ('module1', True), ('module2', True)]
    calls.clear()
    exact(build_global_skip(2), loss_of, backward=backward, recompute_last=False)
    assert calls == [('module1', True), ('module2', True)]


def test_who_completes_the_last_module():
    for learner, expected in ((build(3), True), (build_global_skip(2), False)):
        for again in (True, False):
            steps = ExactSteps(learner, recompute_last=again)
            with steps.step(LABELS):
                learner.model(IMAGES.double() if not expected else IMAGES)
            assert steps.completes_last == (expected and not again)
            steps.forget()


def test_updating_at_once_is_updating_at_the_end():
    learners = [build(3) for _ in range(2)]
    optimizers = [torch.optim.AdamW(lr.model.parameters(), 0.1) for lr in learners]

    def update(loss, module, complete):
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    exact(learners[0], backward=update)
    exact(learners[1])
    optimizers[1].step()
    assert equal(*(learner.model.state_dict() for learner in learners))


# Joint steps.


def summed_loss(learner, weight, maps_of):
    """Loss of the network, plus weighted local losses, with one graph."""

    def loss_of(model):
        maps = {}
        handles = [
            model.get_submodule(module.cut).register_forward_hook(
                lambda _m, _a, output, name=module.cut: maps.update({name: output})
            )
            for module in learner.modules
        ]
        loss = F.cross_entropy(model(IMAGES.double()), LABELS)
        for handle in handles:
            handle.remove()
        for module, head in zip(learner.modules, learner.heads, strict=False):
            own = maps_of(module, maps)
            loss = loss + weight * head(own, LABELS, None)
        return loss

    return loss_of


def in_float64(learner):
    learner.model.double()
    learner.heads.double()
    return learner


def joint_grads(learner, weight, recompute_last=True):
    loss_of = lambda m: F.cross_entropy(m(IMAGES.double()), LABELS)  # noqa: E731
    exact(learner, loss_of, weight, recompute_last=recompute_last)
    return grads_of(all_params(learner))


@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('weight', [0.05, 1.0])
def test_a_joint_step_is_back_propagation_of_the_summed_loss(
    bank, weight, recompute_last
):
    learner = in_float64(build(4, bank=bank and bank()))
    other = copy.deepcopy(learner)

    def maps_of(module, maps):
        names = [m.cut for m in other.modules[: module.index]] if bank else []
        earlier = {name: maps[name].detach() for name in names}
        return {**earlier, module.cut: maps[module.cut]}

    plain(other.model, summed_loss(other, weight, maps_of))
    grads = joint_grads(learner, weight, recompute_last)
    check_close(grads, grads_of(all_params(other)))
    assert list(learner.losses) == ['module3', 'module2', 'module1']
    if bank:
        assert not learner.bank and len(learner.bank.moments()) == 2
    with pytest.raises(AssertionError):  # control
        learner.model.zero_grad()
        learner.heads.zero_grad()
        twice = joint_grads(learner, 2 * weight, recompute_last)
        check_close(twice, grads_of(all_params(other)))


def test_joint_steps_log_the_losses_of_local_steps():
    joint, local = (in_float64(build(3, bank=MemoryBank())) for _ in range(2))
    joint_grads(joint, 0.1)
    with local.step(LABELS):
        local.model(IMAGES.double())
    assert joint.losses == {name: local.losses[name] for name in joint.losses}
    assert equal(joint.bank.state_dict(), local.bank.state_dict())


# Micro-batches.


@pytest.mark.parametrize('weight', [0.0, 0.1])
@pytest.mark.parametrize('size', [1, 3, 4])
def test_micro_batches_are_exact_without_batch_statistics(size, weight):
    def run(size):
        learner = in_float64(build_dropout_learner())
        learner.micro_batch_size = size
        return joint_grads(learner, weight)

    def build_dropout_learner():
        learner = build(3, bank=MemoryBank())
        learner.model.eval()
        return learner

    grads, others = run(size), run(None)
    check_close(
        [g for g in grads if g is not None], [g for g in others if g is not None]
    )


# Memory.


def test_activations_are_those_of_one_module():
    def peak(depth, step):
        model = nn.Sequential()
        for index in range(depth):
            block = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(8)]
            model.add_module(f'stage{index + 1}', nn.Sequential(*block))
        learner = build(depth, model=model)
        x = torch.rand(1, 4, 128, 128)
        return measure_memory(lambda: step(learner, x)).peak

    def in_exact_steps(learner, x):
        exact(learner, lambda model: model(x).sum())

    def in_plain_steps(learner, x):
        learner.model(x).sum().backward()

    map_bytes = 4 * 4 * 128 * 128
    peak(3, in_exact_steps)  # the first step of a process may take a map more
    grows = peak(6, in_exact_steps) - peak(3, in_exact_steps)
    assert 3 * map_bytes <= grows < 3.2 * map_bytes  # a boundary each
    assert peak(6, in_plain_steps) - peak(3, in_plain_steps) > 20 * map_bytes


def test_nothing_survives_a_step(recompute_last):
    learner = build(3, bank=MemoryBank())
    steps = ExactSteps(learner, 0.1, recompute_last)
    for _ in range(2):
        with steps.step(LABELS):
            loss = model_loss(learner.model)
        loss.backward()
        steps.replay()
        assert learner.targets is None and not learner.bank
        assert not (steps._runs or steps._grads or steps._front or steps._local)
        assert steps._last_input is None


# Errors.


def test_an_input_that_is_changed_in_place_is_an_error():
    model = build_model(3)
    model.stage2.insert(0, nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="'stage2' was changed in place"):
        exact(build(3, model=model))


def test_a_part_that_does_not_run_is_an_error():
    learner = build(3)
    with pytest.raises(RuntimeError, match="never ran 'stage1'"):
        exact(learner, lambda model: model.classifier(torch.rand(2, WIDTH, 4, 4)).sum())


def test_a_cut_without_gradients_is_an_error():
    learner = build(3)

    def loss_of(model):
        with torch.no_grad():
            return model_loss(model)

    with pytest.raises(RuntimeError, match="'stage1' ran without gradients"):
        exact(learner, loss_of)
    assert count_hooks(learner.model) == 0 and not vars(learner.model.stage1).get(
        'forward'
    )
