"""Cuts by measured costs: optimal, and what a module's peak consists of."""

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from man_mm.measure import BalancedPartition
from man_mm.measure.peaks import UnitCost, predict
from man_mm.measure.planner import parse_bytes, plan_budget, plan_modules

FIELDS = 'held forward saved head head_grads backward grads output kept'.split()
SHAPE = (2, 3, 800, 1333)


@st.composite
def networks(draw):
    """Costs of a few units, small enough for ties; all or none on micro-batches."""
    in_slices = draw(st.booleans())
    costs = []
    for index in range(draw(st.integers(1, 6))):
        sizes = {field: draw(st.integers(0, 9)) for field in FIELDS}
        ends_stage = draw(st.booleans())
        costs.append(
            UnitCost(
                names=(f'unit{index}',),
                whole=draw(st.integers(1, 9)) if in_slices else 0,
                ends_stage=ends_stage,
                shared=ends_stage and draw(st.booleans()),
                **sizes,
            )
        )
    return costs


def score(plan):
    return plan.peak, sum(module.peak**2 for module in plan.modules)


def brute_force(costs, num_modules):
    """The best score of all partitions."""
    inner = range(1, len(costs))
    return min(
        score(predict(costs, (*ends, len(costs))))
        for ends in itertools.combinations(inner, num_modules - 1)
    )


def check_optimal(planner, costs):
    for num_modules in range(1, len(costs) + 1):
        plan = planner(costs, num_modules)
        assert len(plan.modules) == num_modules
        names = [name for module in plan.modules for name in module.units]
        assert names == [name for cost in costs for name in cost.names]
        assert score(plan) == brute_force(costs, num_modules)


@settings(max_examples=200, deadline=None)
@given(networks())
def test_no_other_cuts_are_better(costs):
    check_optimal(plan_modules, costs)


def equal_lengths(costs, num_modules):
    ends = [len(costs) * (i + 1) // num_modules for i in range(num_modules)]
    return predict(costs, ends)


def greedy(costs, num_modules):
    """Ends a module as soon as it has its share of the bytes."""
    share = sum(cost.saved for cost in costs) / num_modules
    ends, saved = [], 0
    for index, cost in enumerate(costs, 1):
        saved += cost.saved
        to_come = num_modules - len(ends) - 1
        if to_come and (saved >= share or len(costs) - index == to_come):
            ends.append(index)
            saved = 0
    return predict(costs, [*ends, len(costs)])


def forgetful(costs, num_modules):
    """Does not know what the bank keeps."""
    blind = [UnitCost(**{**vars(cost), 'kept': 0}) for cost in costs]
    cuts = plan_modules(blind, num_modules).cuts
    names = [cost.names[-1] for cost in costs]
    return predict(costs, [*(names.index(cut) + 1 for cut in cuts), len(names)])


@pytest.mark.parametrize('planner', [equal_lengths, greedy, forgetful])
def test_the_check_fails_for_another_planner(planner):
    costs = [
        UnitCost((f'unit{index}',), saved=saved, kept=kept, head=1)
        for index, (saved, kept) in enumerate(
            [(6, 9), (1, 0), (1, 0), (6, 0), (3, 0), (2, 0)]
        )
    ]
    check_optimal(plan_modules, costs)
    with pytest.raises(AssertionError):
        check_optimal(planner, costs)


@settings(max_examples=100, deadline=None)
@given(networks(), st.integers(1, 60))
def test_a_budget_takes_the_fewest_modules_that_fit(costs, budget):
    best = [brute_force(costs, k)[0] for k in range(1, len(costs) + 1)]
    fits = [k for k, peak in enumerate(best, 1) if peak <= budget]
    if fits:
        plan = plan_budget(costs, budget, lambda: costs)
        assert len(plan.modules) == fits[0]
        assert plan.peak == best[fits[0] - 1]
    else:
        missing = min(best) - budget
        with pytest.raises(ValueError, match=rf': {missing} bytes .* too many\.'):
            plan_budget(costs, budget, lambda: costs)


def test_end_to_end_training_is_measured_as_it_is():
    """What saves memory inside modules is off with K = 1."""
    costs = [UnitCost(('a',), saved=5), UnitCost(('b',), saved=5)]
    plain = [UnitCost(('a',), saved=8), UnitCost(('b',), saved=8)]
    assert len(plan_budget(costs, 16, lambda: plain).modules) == 1
    assert len(plan_budget(costs, 15, lambda: plain).modules) == 2
    assert len(plan_budget(costs, 9, None).modules) == 2  # not even measured


def test_the_peak_of_a_module_is_that_of_its_phases():
    first = UnitCost(('a', 'b'), held=100, saved=10, grads=3, output=2, backward=1)
    last = UnitCost(('c',), held=40, saved=20, head=7, head_grads=1, output=4)
    (module,) = predict([first, last], [2]).modules
    assert module.units == ('a', 'b', 'c')
    assert module.kinds == dict(held=100, saved=30, head=7, gradients=0, temporaries=0)
    assert module.peak == 137

    long_backward = UnitCost(**{**vars(first), 'backward': 50})
    (module,) = predict([long_backward, last], [2]).modules
    # The output of the module is alive beside what the first unit saved, and so are
    # the gradients of the head's parameters and of the first unit's output.
    assert module.kinds == dict(
        held=100, saved=10 + 4, head=0, gradients=1 + 2, temporaries=50
    )

    two = predict([first, last], [1, 2])
    assert two.cuts == ['b']
    assert [module.kinds['held'] for module in two.modules] == [100, 40]


def test_maps_that_others_read_cost_their_gradients():
    units = [
        UnitCost(('a',), output=8, backward=1, ends_stage=True, shared=True),
        UnitCost(('b',), saved=9, backward=9),
    ]
    private = [UnitCost(**{**vars(units[0]), 'shared': False}), units[1]]
    assert predict(units, [2]).peak == predict(private, [2]).peak + 8


def test_the_bank_keeps_maps_for_all_modules_but_the_next_and_the_last():
    costs = [UnitCost((name,), held=1, kept=10) for name in 'abcde']
    held = [m.kinds['held'] for m in predict(costs, [1, 2, 3, 4, 5]).modules]
    assert held == [1, 1, 11, 21, 1]


def test_micro_batches_cost_whole_maps():
    unit = UnitCost(
        ('a',), saved=4, head=2, output=1, whole=4, ends_stage=True, shared=True
    )
    first, last = predict([unit, unit, unit, unit], [2, 4]).modules
    # Both outputs of all images and both units of one slice, then the head.
    assert first.kinds['saved'] == 4 + 4 + 4 + 4
    # At the end of the network, the units are recomputed: the gradients are whole.
    assert last.kinds['saved'] == 4 + 4 + 4 + 4
    assert last.kinds['gradients'] == 4 + 4 + 1 + 1


def test_fewer_units_than_modules_is_an_error():
    costs = [UnitCost(('a',)), UnitCost(('b',))]
    message = 'num_modules is 3, but the network has 2 units to learn: give 1 to 2'
    with pytest.raises(ValueError, match=message):
        plan_modules(costs, 3)


def test_balanced_partition_measures_its_shape():
    costs = [UnitCost((name,), saved=5) for name in 'abcd']
    asked = []

    def measure(shape, plain=False):
        asked.append((shape, plain))
        return costs

    by_number = BalancedPartition(num_modules=2, input_shape=list(SHAPE))
    assert by_number.cuts([], measure) == ['b']
    assert asked == [(SHAPE, False)]
    by_budget = BalancedPartition(memory_budget='20', input_shape=SHAPE)
    assert by_budget.cuts([], measure) == []
    assert asked[1:] == [(SHAPE, False), (SHAPE, True)]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(input_shape=SHAPE), 'either partition.num_modules or partition.mem'),
        (dict(num_modules=2, memory_budget=9, input_shape=SHAPE), 'takes either'),
        (dict(num_modules=2), r'partition.input_shape=\(2, 3, 800, 1333\); got None'),
        (dict(num_modules=2, input_shape=(800, 1333)), r'got \(800, 1333\)'),
        (dict(num_modules=2, input_shape=(0, 3, 8, 8)), r'got \(0, 3, 8, 8\)'),
        (dict(memory_budget='6 GB', input_shape=SHAPE), "'6GiB'.*got '6 GB'"),
    ],
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        BalancedPartition(**options)


@pytest.mark.parametrize(
    ('text', 'size'),
    [
        ('6GiB', 6 * 2**30),
        ('1.5 GiB', 3 * 2**29),
        ('800MiB', 800 * 2**20),
        ('3KiB', 3072),
        (12345, 12345),
        ('12345', 12345),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize('text', ['', '-1GiB', '0', 'GiB', '1.2.3MiB', '5TiB', None])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(f'got {text!r}')):
        parse_bytes(text)


def test_large_networks_are_planned_in_no_time():
    """A ResNet-152 has 51 units."""
    costs = [
        UnitCost((f'unit{i}',), held=i % 7, saved=50 + i % 5, head=90 - i, kept=i % 3)
        for i in range(51)
    ]
    plan = plan_modules(costs, 12)
    assert len(plan.modules) == 12
    assert plan.peak >= math.ceil(sum(cost.saved for cost in costs) / 12)
