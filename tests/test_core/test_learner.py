"""Local learning on small networks, against loops that detach by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import (
    IMAGES,
    LABELS,
    OPTIMIZERS,
    WIDTH,
    LeakyLearner,
    PooledHead,
    all_params,
    build,
    build_model,
    count_hooks,
    equal,
    model_loss,
    retain,
    stage,
    train_step,
    update_at_once,
)
from torch import nn

from man_mm.core import LocalLearner, MemoryBank
from man_mm.core.cut_hooks import CutHooks
from man_mm.core.local_losses import total_loss
from man_mm.core.partition import outlets

torch.set_num_threads(1)


def snapshot(learner, optimizer):
    parts = (learner.model, learner.heads, optimizer)
    return copy.deepcopy([part.state_dict() for part in parts])


# Contract 1: isolation.


def reached(learner):
    """The parameters that each loss reaches, in the order of the modules."""
    params, found = all_params(learner), []

    def collect():
        found.append({id(p) for p in params if p.grad is not None})
        for param in params:
            param.grad = None

    def backward(loss, module, complete):
        retain(loss, module, complete)
        collect()

    with learner.step(LABELS, backward):
        loss = model_loss(learner.model)
    loss.backward()
    collect()
    return found


def check_isolated(learner):
    owned = [{id(p) for p in learner.params(module)} for module in learner.modules]
    assert reached(learner) == owned
    every = [param for params in owned for param in params]
    assert len(every) == len(set(every)) == len(all_params(learner))


@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('depth', [1, 2, 4])
def test_each_loss_reaches_its_own_module_and_head_alone(depth, bank):
    check_isolated(build(depth, bank=bank and bank()))


def test_a_cut_that_does_not_detach_is_not_isolated():
    with pytest.raises(AssertionError):
        check_isolated(build(3, kind=LeakyLearner))


def test_a_head_that_uses_another_module_is_not_isolated():
    learner = build(3)
    head, other = learner.heads[1], learner.model.stage3[0].weight

    class LeakyHead(nn.Module):
        def forward(self, maps, targets, bank):
            return head(maps, targets, bank) + other.square().sum()

    leaky = LocalLearner(
        learner.model, learner.modules, [learner.heads[0], LeakyHead()]
    )
    leaky.heads[1].inner = head
    with pytest.raises(AssertionError):
        check_isolated(leaky)


def test_a_bank_that_keeps_the_graph_is_not_isolated():
    class LeakyBank(MemoryBank):
        def store(self, name, map_, average=False):
            super().store(name, map_, average)
            self._maps[name] = map_

    with pytest.raises(AssertionError):
        check_isolated(build(3, bank=LeakyBank()))


def boundaries(learner):
    """What each module but the first receives during a step."""
    seen, handles = [], []
    for module in learner.modules[1:]:
        start = learner.model.get_submodule(module.units[0].parts[0])
        handles.append(
            start.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        )
    with learner.step(LABELS, retain):
        model_loss(learner.model)
    for handle in handles:
        handle.remove()
    return seen


def check_boundaries(seen):
    assert all(t.grad_fn is None and not t.requires_grad for t in seen)


def test_a_boundary_has_no_graph():
    seen = boundaries(build(3))
    assert len(seen) == 2
    check_boundaries(seen)
    with pytest.raises(AssertionError):
        check_boundaries(boundaries(build(3, kind=LeakyLearner)))


class Pyramid(nn.Module):
    """Reads the map of every stage, as a detector's neck does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stage1, self.stage2, self.stage3 = stage(2), stage(WIDTH), stage(WIDTH)
        self.neck = nn.Linear(3 * WIDTH, 3)

    def forward(self, x):
        maps = [x := stage(x) for stage in (self.stage1, self.stage2, self.stage3)]
        return self.neck(torch.cat([map_.mean((2, 3)) for map_ in maps], 1))


def test_whatever_skips_a_module_reads_boundaries_too():
    check_isolated(build(3, model=Pyramid()))
    with pytest.raises(AssertionError):
        check_isolated(build(3, model=Pyramid(), kind=LeakyLearner))


# Contract 2: oracles.


def step_by_hand(learner, optimizer, with_bank=False, detach=True):
    """The step that `LocalLearner` must equal, without a single hook."""
    x, earlier = IMAGES, {}
    for module, head in zip(learner.modules[:-1], learner.heads, strict=True):
        for unit in module.units:
            x = learner.model.get_submodule(unit.name)(x)
        head({**earlier, module.cut: x}, LABELS, None).backward(retain_graph=not detach)
        x = x.detach() if detach else x
        if with_bank:
            earlier[module.cut] = x
    for unit in learner.modules[-1].units:
        x = learner.model.get_submodule(unit.name)(x)
    F.cross_entropy(learner.model.classifier(x), LABELS).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(step, depth, optimizer, bank=False, steps=3, **kwargs):
    # One unit a stage, so that maps of other stages inside a module stay out.
    learner = build(depth, bank=MemoryBank() if bank else None)
    optimizer = OPTIMIZERS[optimizer](all_params(learner))
    for _ in range(steps):
        step(learner, optimizer, **kwargs)
    return snapshot(learner, optimizer)


@pytest.mark.parametrize('bank', [False, True])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('depth', [2, 3, 4])
def test_hooks_equal_a_loop_that_detaches_by_hand(depth, optimizer, bank):
    armed = train(train_step, depth, optimizer, bank)
    assert equal(armed, train(step_by_hand, depth, optimizer, bank, with_bank=bank))
    wrong = train(step_by_hand, depth, optimizer, bank, with_bank=bank, detach=False)
    assert not equal(armed, wrong)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_one_module_is_plain_training(optimizer):
    def plain(learner, optimizer):
        model_loss(learner.model).backward()
        optimizer.step()
        optimizer.zero_grad()

    def run(step, cuts):
        learner = build(3, cuts)
        state = OPTIMIZERS[optimizer](all_params(learner))
        for _ in range(3):
            step(learner, state)
        return learner.model.state_dict()

    assert equal(run(train_step, []), run(plain, []))
    assert not equal(run(train_step, ['stage1']), run(plain, []))


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_step_per_module_equals_a_joint_step(optimizer):
    def step(learner, optimizer):
        train_step(learner, optimizer, update_at_once(optimizer))

    def without_clearing(learner, optimizer):
        def backward(loss, module, complete):
            loss.backward()
            optimizer.step()

        train_step(learner, optimizer, backward)

    joint = train(train_step, 3, optimizer, bank=True)
    assert equal(joint, train(step, 3, optimizer, bank=True))
    assert not equal(joint, train(without_clearing, 3, optimizer, bank=True))


def test_losses_are_kept_detached_by_module():
    learner = build(3)
    model = copy.deepcopy(learner.model)
    with learner.step(LABELS):
        model_loss(learner.model)
    assert list(learner.losses) == ['module1', 'module2']
    assert not any(loss.requires_grad for loss in learner.losses.values())
    x = model.stage1(IMAGES)
    expected = learner.heads[0]({'stage1': x}, LABELS, None)
    assert torch.equal(learner.losses['module1'], expected)
    assert not torch.equal(learner.losses['module2'], expected)


def test_heads_get_the_targets_that_are_set_last():
    seen = []

    class Head(PooledHead):
        def forward(self, maps, targets, bank):
            seen.append((list(maps), targets, bank))
            return super().forward(maps, LABELS, bank)

    bank = MemoryBank()
    learner = build(3, bank=bank)
    learner.heads = nn.ModuleList([Head(1), Head(2)])
    change = lambda *_: setattr(learner, 'targets', 'new')  # noqa: E731
    handle = learner.model.stage2[0].register_forward_hook(change)
    with learner.step('old'):
        model_loss(learner.model)
    handle.remove()
    assert seen == [
        (['stage1'], 'old', bank),
        (['stage1', 'stage2'], 'new', bank),
    ]
    assert learner.targets is None


def test_heads_read_the_ends_of_all_stages_inside_a_module():
    bank = MemoryBank()
    learner = build(4, ['stage2'], bank)
    learner.heads = nn.ModuleList([PooledHead(2)])
    assert outlets(learner.modules[0]) == ['stage1', 'stage2']
    with learner.step(LABELS, retain):
        model_loss(learner.model)
    grads = [p.grad for p in learner.params(learner.modules[0])]
    assert all(grad is not None for grad in grads)


class Skip(nn.Module):
    """Adds the map of the first stage to that of the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stage1, self.stage2, self.stage3 = stage(2), stage(WIDTH), stage(WIDTH)
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, x):
        first = self.stage1(x)
        last = self.stage3(self.stage2(first))
        return self.classifier((last + first).mean((2, 3)))


class UnbranchedCuts(CutHooks):
    """Negative control: later modules read the end of an inner stage with its graph."""

    def _leave(self, unit):
        leave = super()._leave(unit)

        def hook(*args):
            leave(*args)  # but do not pass on what it returns

        return hook


class TornCuts(CutHooks):
    """Negative control: a module falls apart at the ends of its stages."""

    def _rejoin(self, unit):
        return lambda *_: None


def build_skip(cuts=CutHooks):
    learner = build(3, ['stage2'], model=Skip())
    learner._cuts = cuts(learner.model)
    learner.heads = nn.ModuleList([PooledHead(2)])  # of both stages
    return learner


def skip_grads(cuts=CutHooks):
    learner = build_skip(cuts)
    with learner.step(LABELS):
        loss = model_loss(learner.model)
    loss.backward()
    return [param.grad for param in all_params(learner)]


def skip_grads_by_hand(torn=False):
    learner = build_skip()
    model, (head,) = learner.model, learner.heads
    first = model.stage1(IMAGES)
    second = model.stage2(first.detach() if torn else first)
    head({'stage1': first, 'stage2': second}, LABELS, None).backward()
    last = model.stage3(second.detach()) + first.detach()
    F.cross_entropy(model.classifier(last.mean((2, 3))), LABELS).backward()
    return [param.grad for param in all_params(learner)]


def test_later_modules_read_the_end_of_an_inner_stage_detached():
    grads = skip_grads()
    assert not any(grad is None for grad in grads)
    assert equal(grads, skip_grads_by_hand())
    assert equal(skip_grads(TornCuts), skip_grads_by_hand(torn=True))
    assert not equal(grads, skip_grads(TornCuts))
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        skip_grads(UnbranchedCuts)


def test_total_loss_sums_what_is_named_a_loss():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor(4.0)
    assert total_loss(b) is b
    losses = {'loss_cls': a, 'loss_bbox': [b, a], 'acc': torch.tensor(50.0)}
    assert total_loss(losses) == 2 + 4 + 2


# Contract 4: the plain model.


def test_outside_a_step_the_model_is_the_plain_model():
    plain, learner = build_model(3), build(3, bank=MemoryBank())
    optimizer = OPTIMIZERS['sgd'](all_params(learner))
    with learner.step(LABELS):
        assert count_hooks(learner.model) > 0
        loss = model_loss(learner.model)
    loss.backward()
    optimizer.step()
    assert count_hooks(learner.model) == count_hooks(plain) == 0

    state = learner.model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert [str(m) for m in learner.model.modules()] == [
        str(m) for m in plain.modules()
    ]
    assert not torch.equal(plain.eval()(IMAGES), learner.model.eval()(IMAGES))
    plain.load_state_dict(state)
    for training in (True, False):
        a, b = plain.train(training)(IMAGES), learner.model.train(training)(IMAGES)
        assert torch.equal(a, b)
        assert b.requires_grad
    grads = [
        torch.autograd.grad(model_loss(model), list(model.parameters()))
        for model in (plain, learner.model)
    ]
    assert equal(*grads)


# Heads that follow the network's weights.


def test_heads_follow_once_before_the_first_step_and_after_each_update():
    learner = build(3)
    seen = []
    learner.heads[1].follow = seen.append
    counts = []
    for updated in (False, True, False, True):
        with learner.step(LABELS):
            counts.append(len(seen))
            model_loss(learner.model)
        if updated:
            learner.updated()
    assert counts == [1, 1, 2, 2]
    assert all(model is learner.model for model in seen)
