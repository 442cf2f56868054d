"""Networks that local learning refuses, and blocks that checkpoint themselves."""

from collections import OrderedDict
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from networks import (
    LABELS,
    WIDTH,
    PooledHead,
    all_params,
    build,
    count_hooks,
    equal,
    model_loss,
    stage,
    train_step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import man_mm.core.learner as learner_file
from man_mm.core import LocalLearner, MemoryBank, Unit, split
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)

# Errors.


@pytest.mark.parametrize('heads', [1, 3])
def test_each_module_but_the_last_needs_a_head(heads):
    learner = build(3)
    with pytest.raises(ValueError, match=f'3 modules need 2 auxiliary.*got {heads}'):
        LocalLearner(learner.model, learner.modules, [PooledHead()] * heads)


def test_local_steps_need_heads():
    learner = build(3)
    without = LocalLearner(learner.model, learner.modules, [])
    with pytest.raises(RuntimeError, match='Local steps need auxiliary heads'):
        with without.step():
            pytest.fail('the step began')


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
    monkeypatch.setattr(learner_file, 'require_grad', lambda x: x)
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
