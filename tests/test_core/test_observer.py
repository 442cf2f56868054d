"""What an observer is told of a training step, and that it changes nothing."""

from contextlib import contextmanager

import pytest
import torch
from networks import LABELS, OPTIMIZERS, all_params, build, equal, train_step

from man_mm.core import MemoryBank


class Notes:
    """Notes what it is told, and the maps that it was shown."""

    def __init__(self):
        self.calls = []
        self.maps = {}

    def passed_on(self, module, maps):
        self.calls.append(module.name)
        self.maps.update(maps)

    @contextmanager
    def bank_changes(self, maps):
        before = list(maps)
        yield
        self.calls.append((before, list(maps)))


class Careless(Notes):
    """Negative control: changes what it is given."""

    def passed_on(self, module, maps):
        maps[module.cut].data.mul_(2)  # which no version counter notices


def train(observer):
    """Trains three modules for three steps; returns all weights."""
    learner = build(3, bank=MemoryBank())
    learner.observer = learner.bank.observer = observer
    optimizer = OPTIMIZERS['adamw'](all_params(learner))
    for _ in range(3):
        train_step(learner, optimizer)
    return [param.detach().clone() for param in all_params(learner)]


def test_a_step_is_told_in_order():
    learner = build(3, bank=MemoryBank())
    notes = learner.observer = learner.bank.observer = Notes()
    train_step(learner, OPTIMIZERS['sgd'](all_params(learner)))
    assert notes.calls == [
        ([], []),  # the bank keeps what later heads read, then stores
        ([], ['stage1']),
        'module1',
        (['stage1'], []),  # the last head has run
        'module2',
        ([], []),
    ]


def test_boundaries_are_shown_when_the_bank_has_them():
    learner = build(3, bank=MemoryBank())
    shown = []

    class Both(Notes):
        def passed_on(self, module, maps):
            same = learner.bank.get(module.cut)
            shown.append(None if same is None else torch.equal(same, maps[module.cut]))

    learner.observer = Both()
    with learner.step(LABELS):
        learner.model(torch.ones(4, 2, 8, 8))
    assert shown == [True, None]


@pytest.mark.parametrize('observer', [Notes, Careless])
def test_training_is_the_same_with_and_without(observer):
    assert equal(train(None), train(observer())) == (observer is Notes)


def test_a_bank_that_fails_ends_the_context():
    ended = []

    class Ends(Notes):
        @contextmanager
        def bank_changes(self, maps):
            try:
                yield
            finally:
                ended.append(True)

    bank = MemoryBank()
    bank.observer = Ends()
    with pytest.raises(AttributeError):
        bank.store('a', None)
    assert ended == [True]
