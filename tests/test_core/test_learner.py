"""Local learning on small networks, against loops that detach by hand."""

import copy
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import man_mm.core.learner as learner_file
from man_mm.core import LocalLearner, MemoryBank, Unit, split
from man_mm.core.learner import stage_ends, total_loss
from man_mm.core.memory import measure_memory, tensor_bytes

torch.set_num_threads(1)

IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])
WIDTH = 4


class PooledHead(nn.Module):
    """Classifies from every map that it is given, earlier modules' included."""

    def __init__(self, maps=1):
        super().__init__()
        self.classifier = nn.Linear(maps * WIDTH, 3)

    def forward(self, maps, targets, bank):
        pooled = torch.cat([map_.mean((2, 3)) for map_ in maps.values()], 1)
        return F.cross_entropy(self.classifier(pooled), targets)


def stage(in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()
    )


def build_model(depth):
    torch.manual_seed(0)
    stages = {f'stage{i + 1}': stage(WIDTH if i else 2) for i in range(depth)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    return nn.Sequential(OrderedDict(**stages, classifier=pool))


def build(depth, cuts=None, bank=None, model=None, kind=LocalLearner):
    model = model or build_model(depth)
    units = [Unit(f'stage{i + 1}', i) for i in range(depth)]
    cuts = [unit.name for unit in units[:-1]] if cuts is None else cuts
    torch.manual_seed(1)
    heads = [PooledHead(i + 1 if bank is not None else 1) for i in range(len(cuts))]
    return kind(model, split(model, units, cuts), heads, bank)


def all_params(learner):
    return [*learner.model.parameters(), *learner.heads.parameters()]


def model_loss(model):
    return F.cross_entropy(model(IMAGES), LABELS)


def train_step(learner, optimizer, backward=None):
    with learner.step(LABELS, backward):
        loss = model_loss(learner.model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(a, b):
    """Bitwise equality of nested dicts and lists of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def snapshot(learner, optimizer):
    parts = (learner.model, learner.heads, optimizer)
    return copy.deepcopy([part.state_dict() for part in parts])


class LeakyLearner(LocalLearner):
    """Negative control: hands on the output with its graph."""

    def _cut(self, module, backward, output):
        super()._cut(module, backward, output)
        return output


def retain(loss, module):
    loss.backward(retain_graph=True)


# Contract 1: isolation.


def reached(learner):
    """The parameters that each loss reaches, in the order of the modules."""
    params, found = all_params(learner), []

    def collect():
        found.append({id(p) for p in params if p.grad is not None})
        for param in params:
            param.grad = None

    def backward(loss, module):
        retain(loss, module)
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
        def store(self, name, map_):
            super().store(name, map_)
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

OPTIMIZERS = {
    'sgd': lambda params: torch.optim.SGD(
        params, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    'adamw': lambda params: torch.optim.AdamW(params, 1e-2),
    'rmsprop': lambda params: torch.optim.RMSprop(params, 1e-2),
}


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


def update_at_once(optimizer):
    def backward(loss, module):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return backward


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_step_per_module_equals_a_joint_step(optimizer):
    def step(learner, optimizer):
        train_step(learner, optimizer, update_at_once(optimizer))

    def without_clearing(learner, optimizer):
        def backward(loss, module):
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
    assert stage_ends(learner.modules[0]) == ['stage1', 'stage2']
    with learner.step(LABELS, retain):
        model_loss(learner.model)
        assert list(bank) == ['stage1', 'stage2']
    grads = [p.grad for p in learner.params(learner.modules[0])]
    assert all(grad is not None for grad in grads)


def test_total_loss_sums_what_is_named_a_loss():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor(4.0)
    assert total_loss(b) is b
    losses = {'loss_cls': a, 'loss_bbox': [b, a], 'acc': torch.tensor(50.0)}
    assert total_loss(losses) == 2 + 4 + 2


# Contract 3: memory. The second step, so that the optimizer has its state.


def stepper(learner):
    optimizer = OPTIMIZERS['sgd'](all_params(learner))

    def step():
        train_step(learner, optimizer, update_at_once(optimizer))

    step()
    return step


def peak(depth, cuts=None, bank=None):
    return measure_memory(stepper(build(depth, cuts, bank))).peak


def leaky_peak(depth):
    learner = build(depth, kind=LeakyLearner)

    def step():
        with learner.step(LABELS, retain):
            loss = model_loss(learner.model)
        loss.backward()
        learner.model.zero_grad()
        learner.heads.zero_grad()

    step()
    return measure_memory(step).peak


def end_to_end_peak(depth):
    return peak(depth, cuts=[])


def check_peak_ignores_later_modules(peak):
    small, *larger = (peak(depth) for depth in (3, 4, 6))
    # Each module more leaves its loss, a float, and no map or gradient.
    assert [value - small for value in larger] == [4, 12]


def test_the_peak_does_not_depend_on_later_modules():
    check_peak_ignores_later_modules(peak)
    for broken in (end_to_end_peak, leaky_peak):
        with pytest.raises(AssertionError):
            check_peak_ignores_later_modules(broken)


def test_the_peak_grows_by_what_the_bank_holds_alone():
    growth = peak(6, bank=MemoryBank()) - peak(4, bank=MemoryBank())
    map_, long_term = 4 * WIDTH * 8 * 8 * 4, 2 * WIDTH * 4
    loss, wider_head = 4, WIDTH * 3 * 4  # a head reads one map more than the last
    assert 2 * map_ < growth <= 2 * (map_ + long_term + loss + wider_head)


def test_the_bytes_in_the_bank_are_reported():
    learner = build(3, bank=MemoryBank())
    with learner.step(LABELS):
        model_loss(learner.model)
        assert list(learner.bank) == ['stage1', 'stage2']
    assert learner.bank_bytes == 2 * (4 * WIDTH * 8 * 8 * 4 + 2 * WIDTH * 4)
    assert not learner.bank


def kept(learner):
    """What is meant to stay: the losses, for the log, and long-term memory."""
    moments = [] if learner.bank is None else learner.bank.moments()
    return [*learner.losses.values(), *moments]


def check_nothing_survives(learner, step):
    old = kept(learner)
    end = measure_memory(step).end
    # Of a step that fails, some statistics are still those of the step before.
    new = [t for t in kept(learner) if not any(t is other for other in old)]
    assert end == tensor_bytes(new)
    assert end <= 2 * (4 + 2 * WIDTH * 4)  # none of it grows with the images


class ShortBank(MemoryBank):
    """Without long-term memory."""

    def __init__(self):
        super().__init__(long_term=False)


@pytest.mark.parametrize('bank', [None, MemoryBank, ShortBank])
@pytest.mark.parametrize('depth', [1, 3])
def test_nothing_of_a_step_survives_it(depth, bank):
    learner = build(depth, bank=bank and bank())
    check_nothing_survives(learner, stepper(learner))


def test_a_head_that_keeps_its_maps_is_found():
    class KeepingHead(PooledHead):
        def forward(self, maps, targets, bank):
            self.kept = maps
            return super().forward(maps, targets, bank)

    learner = build(2)
    learner.heads = nn.ModuleList([KeepingHead()])
    with pytest.raises(AssertionError):
        check_nothing_survives(learner, stepper(learner))


def test_a_bank_that_is_not_cleared_is_found():
    class FullBank(MemoryBank):
        def clear(self):
            self.kept = dict(self)
            super().clear()

    learner = build(3, bank=FullBank())
    with pytest.raises(AssertionError):
        check_nothing_survives(learner, stepper(learner))


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('where', ['body', 'head', 'stage2', 'classifier'])
def test_nothing_survives_a_step_that_fails(where, bank):
    learner = build(3, bank=bank and bank())
    regular = stepper(learner)
    target = {
        'head': learner.heads[1],
        'stage2': learner.model.stage2[1],
        'classifier': learner.model.classifier,
    }.get(where)

    def step():
        handle = target and target.register_forward_hook(fail)
        try:
            with learner.step(LABELS):
                model_loss(learner.model)
                fail()
        except Failure:
            pass
        for param in all_params(learner):
            param.grad = None
        if handle:
            handle.remove()

    check_nothing_survives(learner, step)
    assert count_hooks(learner.model) == 0
    assert learner.targets is None
    assert not learner.bank
    regular()  # the next step is whole again
    assert list(learner.losses) == ['module1', 'module2']


# Contract 4: the plain model.


def count_hooks(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith('hooks')
    )


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


# Errors.


@pytest.mark.parametrize('heads', [0, 1, 3])
def test_each_module_but_the_last_needs_a_head(heads):
    learner = build(3)
    with pytest.raises(ValueError, match=f'3 modules need 2 auxiliary.*got {heads}'):
        LocalLearner(learner.model, learner.modules, [PooledHead()] * heads)


class Path(nn.Module):
    """Runs its stages on a path that a test chooses."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.stage1, self.stage2, self.stage3 = (stage(2) for _ in range(3))
        for part in (self.stage1, self.stage2, self.stage3):
            part[0] = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        x = self.path(self, torch.cat([x, x], 1))
        return x.mean((2, 3))[:, :3]


@contextmanager
def clean_failure(model, message):
    with pytest.raises(RuntimeError, match=message):
        yield
    assert count_hooks(model) == 0


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        (lambda m, x: m.stage3(m.stage1(x)), "never ran the cut 'stage2'"),
        (lambda m, x: m.stage3(x), "never ran the cut 'stage1'"),
        (lambda m, x: m.stage2(m.stage1(m.stage1(x))), "'stage1' ran .*more than once"),
        (lambda m, x: m.stage1(m.stage2(x)), "'stage2' ran out of turn"),
        (
            lambda m, x: m.stage1(m.stage3(m.stage2(m.stage1(x)))),
            "'stage1' ran .*more than once",
        ),
    ],
)
def test_a_cut_that_does_not_run_once_and_in_turn_is_named(path, message):
    learner = build(3, model=Path(path))
    with clean_failure(learner.model, message), learner.step(LABELS):
        model_loss(learner.model)


def test_a_model_that_does_not_run_at_all_is_an_error():
    learner = build(3)
    with clean_failure(learner.model, "'stage1'"), learner.step(LABELS):
        pass


def test_a_cut_that_is_gone_leaves_no_hooks():
    learner = build(3)
    del learner.model.stage2
    with pytest.raises(AttributeError, match='stage2'), learner.step(LABELS):
        pass
    assert count_hooks(learner.model) == 0


def test_an_output_that_is_no_tensor_is_an_error():
    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), None

    model = Path(lambda m, x: m.stage2(m.stage1(x)[0]))
    model.stage1 = Pair(model.stage1)
    learner = build(3, model=model)
    message = "'stage1' returns tuple, not one tensor"
    with clean_failure(model, message), learner.step(LABELS):
        model_loss(model)


def under_no_grad(model, x):
    with torch.no_grad():
        x = model.stage1(x)
    return model.stage3(model.stage2(x))


def with_frozen_stage(model, x):
    model.stage1.requires_grad_(False)
    return model.stage3(model.stage2(model.stage1(x)))


@pytest.mark.parametrize('path', [under_no_grad, with_frozen_stage])
def test_a_cut_without_gradients_is_named(path):
    learner = build(3, model=Path(path))
    message = "'stage1' ran without gradients"
    with clean_failure(learner.model, message), learner.step(LABELS):
        model_loss(learner.model)


def region(reentrant, *names):
    """A path on which the named stages are checkpointed as one."""

    def path(model, x):
        def inside(x):
            for name in names:
                x = model.get_submodule(name)(x)
            return x

        x = checkpoint(inside, x.requires_grad_(), use_reentrant=reentrant)
        for name in ('stage1', 'stage2', 'stage3')[len(names) :]:
            x = model.get_submodule(name)(x)
        return x

    return path


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_cut_inside_a_checkpointed_region_is_named(reentrant):
    learner = build(3, ['stage1'], model=Path(region(reentrant, 'stage1', 'stage2')))
    with clean_failure(learner.model, "'stage1'.*checkpoint"):
        with learner.step(LABELS):
            loss = model_loss(learner.model)
        loss.backward()


def test_two_cuts_inside_a_checkpointed_region_are_named():
    learner = build(3, model=Path(region(False, 'stage1', 'stage2')))
    with clean_failure(learner.model, "cut 'stage1' ran"), learner.step(LABELS):
        model_loss(learner.model)


def test_a_cut_at_the_end_of_a_reentrant_region_is_named():
    learner = build(3, model=Path(region(True, 'stage1')))
    message = "'stage1' ran without gradients.*checkpointed"
    with clean_failure(learner.model, message), learner.step(LABELS):
        model_loss(learner.model)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_cut_may_be_a_submodule_that_is_checkpointed_as_a_whole(reentrant):
    # As by activation_checkpointing of mmengine, which wraps the forward method.
    def trained(wrap, scale=1):
        torch.manual_seed(0)
        path = lambda m, x: m.stage3(m.stage2(m.stage1(x * scale)))  # noqa: E731
        model = Path(lambda m, x: path(m, x.requires_grad_()))
        if wrap:
            inner = model.stage1.forward
            model.stage1.forward = partial(checkpoint, inner, use_reentrant=reentrant)
        learner = build(3, model=model)
        train_step(learner, torch.optim.SGD(all_params(learner), 0.1))
        return [param.detach() for param in all_params(learner)]

    assert equal(trained(wrap=True), trained(wrap=False))
    assert not equal(trained(wrap=True, scale=2), trained(wrap=False))


# Blocks that checkpoint themselves.


class Block(nn.Module):
    """A residual block that recomputes itself, in the way of mmdet's."""

    def __init__(self, reentrant, with_cp=True):
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.GroupNorm(2, WIDTH)
        self.reentrant = reentrant
        self.with_cp = with_cp
        self.runs = 0

    def inner(self, x):
        self.runs += 1
        return x + self.conv2(self.relu(self.norm(self.conv1(x))))

    def forward(self, x):
        if self.with_cp and x.requires_grad:
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        else:
            x = self.inner(x)
        return self.relu(x)


def build_blocks(with_cp, reentrant):
    torch.manual_seed(0)
    blocks = [Block(reentrant, with_cp) for _ in range(6)]
    stages = {f'stage{i}': nn.Sequential(*blocks[2 * i : 2 * i + 2]) for i in range(3)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    stem = nn.Conv2d(2, WIDTH, 3, padding=1)
    model = nn.Sequential(OrderedDict(stem=stem, **stages, classifier=pool))
    units = [Unit('stem', -1)]
    units += [Unit(f'stage{i}.{j}', i) for i in range(3) for j in range(2)]
    heads = [PooledHead(1), PooledHead(2)]
    modules = split(model, units, ['stage0.1', 'stage1.1'])
    return LocalLearner(model, modules, heads, MemoryBank()), blocks


def run_blocks(with_cp, reentrant, spoil=False):
    """Gradients of one step of K = 3, and how often each block ran."""
    learner, blocks = build_blocks(with_cp, reentrant)
    if spoil:
        blocks[2].conv1.weight.data[0, 0, 0, 0] += 1e-3
    with learner.step(LABELS):
        loss = model_loss(learner.model)
    loss.backward()
    assert count_hooks(learner.model) == 0
    return [param.grad for param in all_params(learner)], [b.runs for b in blocks]


@pytest.mark.parametrize('reentrant', [True, False])
def test_blocks_may_checkpoint_themselves(reentrant):
    plain, once = run_blocks(False, reentrant)
    grads, runs = run_blocks(True, reentrant)
    assert once == [1] * 6
    assert runs == [2] * 6  # the first block behind a boundary is no exception
    assert not any(grad is None for grad in grads)
    assert equal(grads, plain)
    assert not equal(grads, run_blocks(True, reentrant, spoil=True)[0])


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_boundary_without_grad_would_not_be_checkpointed(reentrant, monkeypatch):
    monkeypatch.setattr(learner_file, '_require_grad', lambda _module, args: args)
    assert run_blocks(True, reentrant)[1] == [2, 2, 1, 2, 1, 2]


@pytest.mark.parametrize('reentrant', [True, False])
def test_nothing_survives_a_step_of_checkpointed_blocks(reentrant):
    # Even while the loss is kept, as most loops do until the next one replaces it.
    learner, _ = build_blocks(True, reentrant)
    kept_loss = []

    def step():
        kept_loss.clear()
        with learner.step(LABELS):
            kept_loss.append(model_loss(learner.model))
        kept_loss[0].backward()
        learner.model.zero_grad()
        learner.heads.zero_grad()

    step()
    map_bytes = 4 * WIDTH * 8 * 8 * 4
    assert measure_memory(step).end < map_bytes
