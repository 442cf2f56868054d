import io
import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from man_mm.benchmark.paired_differences import (
    MARGINS,
    PairedDifference,
    difference_rows,
    make_difference_table,
    paired_difference,
)

SCORE = st.integers(0, 1000).map(lambda score: score / 10)


@given(st.lists(st.tuples(SCORE, SCORE), min_size=2, max_size=8))
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    assume(len({round(a - b, 6) for a, b in pairs}) > 1)
    baseline, results = zip(*pairs, strict=True)
    difference = paired_difference(dict(enumerate(baseline)), dict(enumerate(results)))
    expected = stats.ttest_rel(results, baseline).confidence_interval(0.95)
    assert difference.low == pytest.approx(expected.low, abs=1e-6)
    assert difference.high == pytest.approx(expected.high, abs=1e-6)


def test_what_seeds_share_cancels_out():
    baseline = {0: 70.0, 1: 80.0, 2: 90.0}
    paired = paired_difference(baseline, {0: 70.9, 1: 81.0, 2: 91.1})
    assert paired.verdict(0.3) == 'better'
    shuffled = paired_difference(baseline, {0: 91.1, 1: 70.9, 2: 81.0})  # control
    assert shuffled.verdict(0.3) == 'undecided'


def test_only_seeds_of_both_are_compared():
    difference = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 2.5, 0: 1.5, 7: 0.0})
    assert difference.seeds == (0, 1)
    assert difference.mean == 0.5
    with pytest.raises(ValueError, match=r'seeds \[0\].* \[1\].*no pair'):
        paired_difference({0: 1.0}, {1: 1.0})


def test_one_seed_decides_nothing():
    difference = paired_difference({0: 80.0}, {0: 90.0})
    assert (difference.low, difference.high) == (-math.inf, math.inf)
    assert difference.verdict(0.3) == 'undecided'


@pytest.mark.parametrize(
    ('low', 'high', 'verdict'),
    [
        (0.1, 0.5, 'better'),
        (-0.2, 0.5, 'not inferior'),
        (-0.2, -0.1, 'not inferior'),
        (-0.4, 0.5, 'undecided'),
        (-0.9, -0.4, 'inferior'),
    ],
)
def test_verdicts(low, high, verdict):
    assert PairedDifference((0, 1), (low + high) / 2, low, high).verdict(0.3) == verdict


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match='margin must be at least 0, got -0.3'):
        PairedDifference((0,), 0, 0, 0).verdict(-0.3)


def test_the_table_compares_with_the_first_method():
    scores = {'end-to-end': (0.20, 0.22), 'MAN': (0.21, 0.231), 'DGL': (0.1, 0.12)}
    results = [
        dict(name=name, seed=seed, metrics={'coco/bbox_mAP': value})
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    head, rows = difference_rows(results)
    assert head[-1] == 'verdict at a margin of 0.003'  # that of the protocol
    assert [row[-1] for row in rows] == ['better', 'inferior']
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_difference_table(results, margin=0.003))
    text = console.export_text()
    assert 'paired differences: coco/bbox_mAP to end-to-end' in text
    rows = [line for line in text.splitlines() if 'MAN' in line or 'DGL' in line]
    assert 'better' in rows[0] and '+0.0105' in rows[0]
    assert 'inferior' in rows[1] and '-0.1' in rows[1]


def test_a_metric_without_a_margin_has_no_verdicts():
    results = [
        dict(name=name, seed=seed, metrics={'SSIM': 0.9 + seed / 100})
        for name in ('end-to-end', 'MAN')
        for seed in (0, 1)
    ]
    head, rows = difference_rows(results)
    assert len(head) == len(rows[0]) == 4
    head, rows = difference_rows(results, margin=0.01)
    assert rows[0][-1] == 'not inferior'


def test_margins_are_those_of_the_protocol():
    text = Path('docs/protocol.md').read_text()
    assert '(0.003)' in text and MARGINS['coco/bbox_mAP'] == 0.003
    assert '0.3 points of top-1' in text and MARGINS['accuracy/top1'] == 0.3
    assert '0.03 dB of PSNR' in text and MARGINS['PSNR'] == 0.03
