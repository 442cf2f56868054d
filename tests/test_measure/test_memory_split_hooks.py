"""The hooks of the split change nothing, leave nothing behind, and miss no byte."""

import pytest
import torch
from networks import (
    OPTIMIZERS,
    all_params,
    build,
    count_hooks,
    train_step,
    update_at_once,
)
from test_memory import CASES
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

from man_mm.core import MemoryBank
from man_mm.measure import memory_split
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)


# Splitting changes nothing, and adds up.


def learner_step(kwargs):
    learner = build(4, **kwargs)
    optimizer = OPTIMIZERS['adamw'](all_params(learner))

    def step():
        train_step(learner, optimizer, update_at_once(optimizer))

    step()
    return step, dict(learner=learner)


def micro_batches():
    step, kwargs = learner_step(dict(bank=MemoryBank()))
    kwargs['learner'].micro_batch_size = 2
    return step, kwargs


def blocks_step(use_reentrant):
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]
    x = torch.randn(128, 64, requires_grad=True)

    def step():
        y = x
        for block in blocks:
            y = y + checkpoint(block, y, use_reentrant=use_reentrant)
        y.square().mean().backward()
        x.grad = None
        for block in blocks:
            block.zero_grad()

    return step, dict(groups={f'block{i}': block for i, block in enumerate(blocks)})


STEPS = {
    **{name: lambda make=make: (make(), {}) for name, (make, _) in CASES.items()},
    'blocks, reentrant': lambda: blocks_step(True),
    'blocks, non-reentrant': lambda: blocks_step(False),
    'learner': lambda: learner_step({}),
    'learner with bank': lambda: learner_step(dict(bank=MemoryBank())),
    'learner with micro-batches': micro_batches,
}


@pytest.mark.parametrize('name', STEPS)
def test_the_split_adds_up_and_changes_nothing(name):
    step, kwargs = STEPS[name]()
    with_split = measure_memory(step, **kwargs)
    without = measure_memory(step, split=False)
    assert (with_split.peak, with_split.end) == (without.peak, without.end)
    assert sum(with_split.kinds.values()) == with_split.peak
    assert sum(with_split.modules.values()) == with_split.peak
    assert min(*with_split.kinds.values(), *with_split.modules.values()) >= 0
    assert measure_memory(step, **kwargs) == with_split
    assert without.kinds == without.modules == {}


def test_hooks_that_keep_what_they_pack_are_found(monkeypatch):
    kept = []

    class Keeping(memory_split._Packed):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self.tensor)

    monkeypatch.setattr(memory_split, '_Packed', Keeping)
    with pytest.raises(AssertionError):
        test_the_split_adds_up_and_changes_nothing('encoder')


# What the hooks must leave alone.


@pytest.mark.parametrize('split', [True, False])
def test_changed_variables_are_still_found(split):
    x = torch.zeros(10, requires_grad=True)

    def fn():
        y = x.exp()
        y.add_(1)
        y.sum().backward()

    message = 'needed for gradient computation has been modified by an inplace'
    with pytest.raises(RuntimeError, match=message):
        measure_memory(fn, split=split)


@pytest.mark.parametrize('fails', [True, False])
def test_nothing_stays_behind(fails):
    step, kwargs = learner_step(dict(bank=MemoryBank()))
    learner = kwargs['learner']

    def left():
        return (
            learner.bank.observer,
            learner.observer,
            len(_global_optimizer_post_hooks),
        )

    before = left()

    def fn():
        step()
        assert all(a != b for a, b in zip(left(), before, strict=True))
        assert count_hooks(learner.model) and count_hooks(learner.heads)
        if fails:
            raise KeyError

    if fails:
        with pytest.raises(KeyError):
            measure_memory(fn, **kwargs)
    else:
        measure_memory(fn, **kwargs)
    assert count_hooks(learner.model) == count_hooks(learner.heads) == 0
    assert left() == before
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch._C._is_multithreading_enabled()


def test_what_forbids_hooks_is_measured_without_the_split():
    def fn():
        return torch.func.grad(lambda x: (x * x).sum())(torch.ones(1000))

    assert measure_memory(fn, split=False).peak >= 3 * 4000
    with pytest.raises(RuntimeError, match='saved tensor hooks'):
        measure_memory(fn)


def test_a_tensor_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    def fn():
        pair = TwoTensor(torch.ones(1000), torch.ones(1000)).requires_grad_()
        (pair * pair).exp().sum().backward()

    fn()
    report = measure_memory(fn)
    assert report.peak == measure_memory(fn, split=False).peak > 0
    assert sum(report.kinds.values()) == report.peak
