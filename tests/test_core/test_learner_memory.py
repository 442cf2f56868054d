"""What a step of local learning keeps in memory, and for how long."""

import pytest
import torch
from networks import (
    LABELS,
    OPTIMIZERS,
    WIDTH,
    LeakyLearner,
    PooledHead,
    all_params,
    build,
    count_hooks,
    model_loss,
    retain,
    train_step,
    update_at_once,
)
from torch import nn

from man_mm.core import MemoryBank
from man_mm.core.storages import tensor_bytes
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)

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
        assert not learner.bank  # no head is left that would read it
    assert learner.bank_bytes == 4 * WIDTH * 8 * 8 * 4 + 2 * WIDTH * 4


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


def test_heads_that_read_averages_alone_keep_no_map():
    learner = build(3, bank=MemoryBank())
    with learner.step(LABELS):
        whole = model_loss(learner.model)
    losses, bytes_ = learner.losses, learner.bank_bytes
    learner = build(3, bank=MemoryBank())
    for head in learner.heads:
        head.reads_averages = True
    with learner.step(LABELS):
        assert torch.equal(model_loss(learner.model), whole)
    torch.testing.assert_close(learner.losses, losses)  # it averages once more
    assert learner.bank_bytes == bytes_ - 4 * WIDTH * (8 * 8 - 1) * 4


def test_maps_that_no_later_head_reads_are_freed():
    learner = build(3, bank=MemoryBank())
    learner.heads = nn.ModuleList([PooledHead(), PooledHead()])
    learner.heads[1].reads = frozenset()
    with learner.step(LABELS):
        model_loss(learner.model)
    assert learner.bank_bytes == 0 and not learner.bank.moments()


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
        def keep(self, names):
            self.kept = dict(self)
            super().keep(names)

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
