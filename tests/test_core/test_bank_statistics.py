"""The long-term statistics of the memory bank; they resume bit by bit."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import learned_map

from man_mm.core import MemoryBank

torch.set_num_threads(1)

shapes = st.tuples(*(st.integers(1, high) for high in (3, 4, 5, 5)))


map_ = pytest.fixture(learned_map)


def test_clear_forgets_the_batch_but_not_the_long_term(map_):
    bank = MemoryBank()
    bank.store('a', map_)
    bank.clear()
    assert not bank and 'a' not in bank
    before = bank.statistics('a')
    check_statistics(bank, pooled([map_]))
    bank.clear()  # nothing is noted any more
    assert all(map(torch.equal, bank.statistics('a'), before))


def test_bytes_include_the_moments_that_are_noted_until_clear(map_):
    maps, long_term = 2 * 3 * 4 * 5 * 4, 2 * 3 * 4
    bank = fill(MemoryBank(), [map_])
    assert bank.nbytes == long_term
    for _ in range(2):  # storing again replaces what was noted
        bank.store('a', map_)
        assert bank.nbytes == maps + 2 * long_term
    bank.clear()
    assert bank.nbytes == long_term


# Long-term statistics.


def pooled(batches):
    """Mean and variance of each channel over all batches, in double precision."""
    joint = torch.cat([b.double() for b in batches]).transpose(0, 1).flatten(1)
    return joint.mean(1), joint.var(1, correction=0)


def weighted(batches, momentum):
    """The recursion of the long-term memory, written out as weights."""
    weights = []
    for seen in range(len(batches)):
        keep = min(momentum, seen / (seen + 1))
        weights = [weight * keep for weight in weights] + [1 - keep]
    assert math.isclose(sum(weights), 1)
    pairs = list(zip(weights, batches, strict=True))
    mean = sum(w * b.double().mean((0, 2, 3)) for w, b in pairs)
    square = sum(w * b.double().square().mean((0, 2, 3)) for w, b in pairs)
    return mean, square - mean**2


def check_statistics(bank, expected, rtol=1e-4, atol=1e-4):
    for actual, wanted in zip(bank.statistics('a'), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol)


class BiasedBank(MemoryBank):
    """Negative control: a running average that starts from zero."""

    def store(self, name, map_, average=False):
        if not self._updates.get(name):
            self._moments[name] = torch.zeros(2, map_.shape[1])
            self._updates[name] = 10**9
        super().store(name, map_, average)


def fill(bank, batches):
    for batch in batches:
        bank.store('a', batch)
        bank.clear()
    return bank


def draw_batches(seed, number, shape):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[1], 1, 1, generator=generator) + 0.5
    return [
        torch.randn(shape, generator=generator) * scale + 2 * scale - 1
        for _ in range(number)
    ]


@given(st.integers(0, 99), st.integers(1, 12), shapes)
@settings(max_examples=40, deadline=None)
def test_the_first_updates_are_a_plain_average(seed, number, shape):
    batches = draw_batches(seed, number, shape)
    smallest = (number - 1) / number  # that still lets the first updates be plain
    for momentum in (smallest, 0.99):
        check_statistics(fill(MemoryBank(momentum=momentum), batches), pooled(batches))
    with pytest.raises(AssertionError):
        check_statistics(fill(BiasedBank(), batches), pooled(batches))


@given(st.integers(0, 99), st.floats(0, 0.99), st.integers(1, 60), shapes)
@settings(max_examples=40, deadline=None)
def test_later_updates_forget_at_the_rate_of_the_momentum(seed, momentum, n, shape):
    batches = draw_batches(seed, n, shape)
    bank = fill(MemoryBank(momentum=momentum), batches)
    check_statistics(bank, weighted(batches, momentum))


@given(st.integers(0, 99), st.floats(0.9, 0.99))
@settings(max_examples=10, deadline=None)
def test_the_statistics_converge_to_the_true_ones(seed, momentum):
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    bank = MemoryBank(momentum=momentum)
    for _ in range(300):
        noise = torch.randn(4, 3, 8, 8, generator=generator)
        bank.store('a', noise * std.view(3, 1, 1) + mean.view(3, 1, 1))
        bank.clear()
    # 256 samples a batch, at least (1 + m) / (1 - m) = 19 batches in effect: the
    # standard errors are below 1.5 % of std, and 2 % of the variance plus the mean's.
    actual_mean, actual_var = bank.statistics('a')
    assert ((actual_mean - mean).abs() < 0.1 * std).all()
    assert ((actual_var - std**2).abs() < 0.1 * std**2 + 0.02).all()


def check_unchanged_until_clear(bank):
    first, second = draw_batches(0, 2, (2, 3, 4, 4))
    bank.store('a', first)
    assert bank.statistics('a') is None
    bank.clear()
    before = bank.statistics('a')
    check_statistics(bank, pooled([first]))
    bank.store('a', second)
    assert all(map(torch.equal, bank.statistics('a'), before))
    bank.clear()
    check_statistics(bank, pooled([first, second]))


class EagerBank(MemoryBank):
    """Negative control: a step reads its own statistics."""

    def store(self, name, map_, average=False):
        super().store(name, map_, average)
        self._remember(name, self._pending.pop(name))


def test_statistics_do_not_change_between_store_and_clear():
    check_unchanged_until_clear(MemoryBank())
    with pytest.raises(AssertionError):
        check_unchanged_until_clear(EagerBank())


class TrustingBank(MemoryBank):
    """Negative control: adds whatever it gets."""

    def _remember(self, name, new):
        old = self._moments.get(name, new)
        self._moments[name] = torch.lerp(new, old, self.momentum)


def check_skips(bank, value):
    good, bad, later = draw_batches(0, 3, (2, 3, 4, 4))
    bad[0, :, 0, 0] = value  # once in each channel
    before = fill(bank, [good]).statistics('a')
    assert all(map(torch.equal, fill(bank, [bad]).statistics('a'), before))
    expected = fill(MemoryBank(momentum=0.5), [good, later]).statistics('a')
    assert all(map(torch.equal, fill(bank, [later]).statistics('a'), expected))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_maps_that_are_not_finite_are_skipped(value):
    check_skips(MemoryBank(momentum=0.5), value)
    with pytest.raises(AssertionError):
        check_skips(TrustingBank(momentum=0.5), value)


def test_the_same_map_again_and_again_keeps_its_statistics():
    (batch,) = draw_batches(0, 1, (2, 3, 4, 4))
    check_statistics(fill(MemoryBank(momentum=0.7), [batch] * 50), pooled([batch]))


def test_a_variance_is_never_negative():
    # Nearly constant channels, for which rounding is all that there is.
    values = torch.rand(1, 512, 1, 1, generator=torch.Generator().manual_seed(0)) * 100
    batches = [(values * (1 + 1e-7 * i)).expand(2, 512, 3, 3) for i in range(4)]
    bank = fill(MemoryBank(), batches)
    mean, square = bank.moments()[0]
    assert (square < mean**2).any()  # so something has to be done about it
    assert (bank.statistics('a')[1] >= 0).all()


def test_statistics_of_an_unknown_map_are_none(map_):
    bank = MemoryBank()
    assert bank.statistics('a') is None
    bank.store('b', map_)
    bank.clear()
    assert bank.statistics('a') is None


def test_statistics_carry_no_graph(map_):
    bank = MemoryBank()
    bank.store('a', map_)
    bank.clear()
    assert not any(t.requires_grad for t in (*bank.statistics('a'), *bank.moments()))


def test_an_update_leaves_the_old_statistics_to_graphs_that_saved_them(map_):
    bank = MemoryBank(momentum=0.5)
    bank.store('a', map_)
    bank.clear()
    scale = torch.ones(3, requires_grad=True)
    product = scale * bank.statistics('a')[0]
    wanted = bank.statistics('a')[0].clone()
    bank.store('a', map_ * 5)
    bank.clear()
    product.sum().backward()
    assert torch.equal(scale.grad, wanted)


def test_half_precision_maps_are_averaged_in_single(map_):
    bank = MemoryBank()
    bank.store('a', map_.to(torch.bfloat16))
    assert bank['a'].dtype == torch.bfloat16
    bank.clear()
    assert bank.statistics('a')[0].dtype == torch.float32


@pytest.mark.parametrize('momentum', [-0.1, 1, 1.5, float('nan')])
def test_a_momentum_outside_its_range_is_an_error(momentum):
    with pytest.raises(ValueError, match=r'momentum must be in \[0, 1\), got'):
        MemoryBank(momentum=momentum)


# Resume.


def equal_states(a, b):
    moments, others = a['moments'], b['moments']
    return (
        a['updates'] == b['updates']
        and moments.keys() == others.keys()
        and all(torch.equal(moments[name], others[name]) for name in moments)
    )


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_bank_ends_bitwise_where_the_uninterrupted_one_ends():
    batches = draw_batches(0, 8, (2, 3, 4, 4))
    straight = fill(MemoryBank(momentum=0.9), batches)
    state = through_a_file(fill(MemoryBank(momentum=0.9), batches[:3]).state_dict())
    resumed = MemoryBank(momentum=0.9)
    resumed.load_state_dict(state)
    assert equal_states(resumed.state_dict(), state)
    fill(resumed, batches[3:])
    assert equal_states(resumed.state_dict(), straight.state_dict())

    # Without the number of updates it would start averaging afresh.
    forgetful = MemoryBank(momentum=0.9)
    forgetful.load_state_dict({**state, 'updates': {}})
    fill(forgetful, batches[3:])
    forgetful._updates = straight.state_dict()['updates']
    assert not equal_states(forgetful.state_dict(), straight.state_dict())


def test_a_saved_state_holds_no_maps_and_does_not_change_later(map_):
    bank = MemoryBank()
    bank.store('a', map_)
    bank.clear()
    bank.store('a', map_ * 2)
    state = bank.state_dict()
    assert set(state) == {'moments', 'updates'}
    kept = {name: tensor.clone() for name, tensor in state['moments'].items()}
    bank.clear()
    bank.store('a', map_ * 3)
    bank.store('b', map_)
    bank.clear()
    assert equal_states(state, {'moments': kept, 'updates': {'a': 1}})
    assert not equal_states(state, bank.state_dict())


def test_a_loaded_state_is_a_copy(map_):
    bank, other = MemoryBank(), MemoryBank()
    bank.store('a', map_)
    bank.clear()
    other.load_state_dict(bank.state_dict())
    bank.moments()[0].zero_()
    assert other.statistics('a')[0].abs().sum() > 0


def test_moments_are_live_and_in_the_order_of_names(map_):
    bank = MemoryBank()
    bank.store('b', map_)
    bank.store('a', map_[:, :2])
    bank.clear()
    a, b = bank.moments()
    assert (a.shape, b.shape) == ((2, 2), (2, 3))
    a[0] = 7  # as an average over ranks would
    assert bank.statistics('a')[0].eq(7).all()
