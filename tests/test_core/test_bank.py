"""What the memory bank keeps, for how long, and in how many bytes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PooledHead, learned_map
from torch import nn

from man_mm.core import LocalLearner, MemoryBank, Unit, split

torch.set_num_threads(1)

map_ = pytest.fixture(learned_map)


class LeakyBank(MemoryBank):
    """Negative control: keeps the graph."""

    def store(self, name, map_, average=False):
        super().store(name, map_, average)
        self._maps[name] = map_


class CopyingBank(MemoryBank):
    """Negative control: keeps a second copy."""

    def store(self, name, map_, average=False):
        super().store(name, map_.clone(), average)


def check_stored(bank, map_):
    bank.store('a', map_)
    stored = bank['a']
    assert torch.equal(stored, map_)
    assert stored.grad_fn is None
    assert not stored.requires_grad
    assert stored.untyped_storage().data_ptr() == map_.untyped_storage().data_ptr()


def test_a_stored_map_is_detached_and_not_copied(map_):
    check_stored(MemoryBank(), map_)
    for broken in (LeakyBank(), CopyingBank()):
        with pytest.raises(AssertionError):
            check_stored(broken, map_)


def test_the_bank_is_a_mapping_in_order_of_storing(map_):
    bank = MemoryBank()
    assert len(bank) == 0 and 'b' not in bank
    bank.store('b', map_)
    bank.store('a', map_ + 1)
    assert list(bank) == ['b', 'a'] and len(bank) == 2
    assert torch.equal({**bank}['a'], map_ + 1)
    with pytest.raises(KeyError):
        bank['c']
    with pytest.raises(TypeError):
        bank['c'] = map_


def test_clear_empties_what_the_heads_of_a_step_share(map_):
    bank = MemoryBank()
    shared = bank.shared
    shared['assignments'] = [map_]
    bank.store('a', map_)
    assert shared == {'assignments': [map_]}
    bank.clear()
    assert shared == {} and bank.shared is shared


def test_storing_again_replaces_the_map(map_):
    bank = MemoryBank()
    bank.store('a', map_)
    bank.store('a', map_ * 2)
    assert len(bank) == 1
    assert torch.equal(bank['a'], map_ * 2)


@pytest.mark.parametrize('view', [False, True])
def test_a_change_in_place_after_storing_is_detected(map_, view):
    bank = MemoryBank()
    map_ = map_.detach()
    bank.store('a', map_)
    assert bank['a'].sum() == map_.sum()  # out of place
    (map_[:1] if view else map_).mul_(2)
    with pytest.raises(RuntimeError, match="'a'.*changed in place.*out of place"):
        bank['a']
    with pytest.raises(RuntimeError, match='changed in place'):
        dict(bank)


def test_a_change_in_place_before_storing_is_fine(map_):
    bank = MemoryBank()
    map_ = map_.detach().mul_(2)
    bank.store('a', map_)
    assert torch.equal(bank['a'], map_)


# Contract 7, on a network that trains.


class SnapshotBank(MemoryBank):
    """Remembers what each map looked like when it was stored."""

    def __init__(self):
        super().__init__()
        self.before, self.stored = {}, {}

    def store(self, name, map_, average=False):
        super().store(name, map_, average)
        self.stored[name] = map_.detach()
        self.before[name] = map_.detach().clone()


def run_step(inplace):
    """One step of K = 4; returns the maps as stored, and after the network ran."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            nn.LeakyReLU(-1.0, inplace=inplace and index == 2),  # changes any map
            nn.Conv2d(2 if index == 0 else 4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),  # in place, but inside of a module
        )
        for index in range(4)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = nn.Sequential(*stages, head)
    units = [Unit(str(index), index) for index in range(4)]
    bank = SnapshotBank()
    heads = [PooledHead(index + 1) for index in range(3)]
    learner = LocalLearner(model, split(model, units, ['0', '1', '2']), heads, bank)
    images, labels = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0])
    with learner.step(labels):
        F.cross_entropy(model(images), labels).backward()
    return bank.before, bank.stored


def test_maps_are_equal_before_and_after_the_next_modules_ran():
    before, after = run_step(inplace=False)
    assert list(before) == list(after) == ['0', '1']  # no head reads the last one
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_in_place_op_after_a_cut_is_an_error():
    with pytest.raises(RuntimeError, match="'1'.*changed in place"):
        run_step(inplace=True)


# Bytes.


def test_bytes_equal_a_count_by_hand(map_):
    bank = MemoryBank()
    assert bank.nbytes == 0
    bank.store('a', map_)
    maps, long_term = 2 * 3 * 4 * 5 * 4, 2 * 3 * 4
    assert bank.nbytes == maps + long_term
    bank.store('b', map_[:, :2])  # shares the storage of a
    assert bank.nbytes == maps + long_term + 2 * 2 * 4
    bank.store('c', map_.detach().double())
    assert bank.nbytes == maps * 3 + long_term * 2 + 2 * 2 * 4
    bank.clear()
    assert bank.nbytes == long_term * 2 + 2 * 2 * 4


def test_without_long_term_memory_nothing_outlives_clear(map_):
    bank = MemoryBank(long_term=False)
    bank.store('a', map_)
    assert bank.nbytes == 480
    assert bank.statistics('a') is None
    bank.clear()
    assert bank.nbytes == 0
    assert bank.moments() == []


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), max_size=8))
@settings(max_examples=20, deadline=None)
def test_long_term_memory_has_a_fixed_size(batches):
    bank = MemoryBank()
    for number, side in [(1, 1), *batches]:
        bank.store('a', torch.rand(number, 5, side, side))
        bank.store('b', torch.rand(number, 7, 1, side))
        bank.clear()
        assert bank.nbytes == 2 * (5 + 7) * 4
        assert [tuple(m.shape) for m in bank.moments()] == [(2, 5), (2, 7)]
