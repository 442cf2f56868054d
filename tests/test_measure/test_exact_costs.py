"""What exact steps will need, predicted from what units cost in local ones."""

import pytest

from man_mm.benchmark.card_needs import Counter
from man_mm.engine.config_files import load_config
from man_mm.engine.options import has_heads
from man_mm.measure import peaks
from man_mm.measure.peaks import exact_costs
from man_mm.measure.planner import plan_modules

SHAPE = (16, 3, 96, 96)


@pytest.fixture(scope='module')
def counter():
    return Counter(load_config('configs/man/resnet50_man_imagenet.py'), SHAPE)


def counted(counter, cuts, kind='exact'):
    need = counter.count(kind, kind, cuts)
    return need.peak - need.kinds['parameters'] - need.kinds['optimizer state']


@pytest.mark.parametrize('num_modules', [2, 4, 8, 12])
def test_peaks_of_exact_steps_are_predicted(counter, num_modules):
    plan = plan_modules(exact_costs(counter.costs), num_modules)
    assert plan.peak == pytest.approx(counted(counter, plan.cuts), rel=0.06)


@pytest.mark.parametrize('num_modules', [2, 8])
def test_peaks_of_joint_steps_are_predicted(counter, num_modules):
    plan = plan_modules(exact_costs(counter.costs, with_heads=True), num_modules)
    assert plan.peak == pytest.approx(counted(counter, plan.cuts, 'joint'), rel=0.06)


@pytest.mark.parametrize('num_modules', [2, 4])
def test_what_necks_read_and_what_is_frozen_is_kept_once(num_modules):
    cfg = load_config('configs/man/retinanet_r50_man_coco.py')
    counter = Counter(cfg, (1, 3, 608, 960), objects=8)
    plan = plan_modules(exact_costs(counter.costs), num_modules)
    assert plan.peak == pytest.approx(counted(counter, plan.cuts), rel=0.04)
    assert counter.costs[0].entry == 256 * 152 * 240 * 4  # behind the frozen layer1


def test_boundaries_that_are_forgotten_are_found_out(counter):
    local = plan_modules(counter.costs, 8)
    assert local.peak < 0.9 * counted(counter, local.cuts)


def test_exact_steps_are_cut_elsewhere(counter):
    cuts = [
        plan_modules(costs, 8).cuts
        for costs in (counter.costs, exact_costs(counter.costs))
    ]
    assert cuts[0] != cuts[1]
    assert counted(counter, cuts[1]) < 0.95 * counted(counter, cuts[0])


def test_a_partition_that_measures_plans_for_the_steps_it_gets(counter):
    exact = counter.count('exact', 'exact+K=8').cuts
    assert list(exact) == plan_modules(exact_costs(counter.costs), 8).cuts
    assert list(counter.count('local', 'local+K=8').cuts) != list(exact)


def test_every_boundary_adds_to_all_later_modules():
    unit = peaks.UnitCost(('a',), saved=4, output=2, head=8, head_grads=1, kept=3)
    costs = exact_costs([unit, unit, unit, unit])
    assert [cost.boundary for cost in costs] == [2, 2, 2, 0]
    assert [cost.head for cost in costs] == [0, 0, 0, 8]
    held = [
        module.kinds['held'] for module in peaks.predict(costs, [1, 2, 3, 4]).modules
    ]
    assert held == [0, 0, 2, 4]
    joint = exact_costs([unit, unit], with_heads=True)
    assert joint[0].head == 8 and joint[0].kept == 0


def test_heads_of_joint_steps_run_before_their_modules_save():
    def kinds(**options):
        first = peaks.UnitCost(('a',), saved=4, output=2, **options)
        second = peaks.UnitCost(('b',), saved=4, output=2, head=8)
        units = [first, second, peaks.UnitCost(('c',))]
        return peaks.predict(exact_costs(units, with_heads=True), [2, 3]).modules[0]

    assert kinds().kinds['saved'] == 2  # the boundary
    assert kinds(ends_stage=True).kinds['saved'] == 8  # which the head reads as well


@pytest.mark.parametrize(
    ('share', 'weight', 'expected'),
    [
        (None, 0.0, True),
        (0, 0.0, False),
        (0, 0.05, True),
        (0, 'balanced', True),
        (0.5, 0.0, True),
    ],
)
def test_heads_count_wherever_a_step_has_local_losses(share, weight, expected):
    assert has_heads(dict(end_to_end_from=share, local_loss_weight=weight)) == expected
