"""The tables of memory_bank.md are those of the raw results."""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

RESULTS = Path('benchmarks/results/memory_bank/screening.jsonl')
ROW = re.compile(r'^\|[^|]*\| `(\S+) (\S+) (\S+)` \| (\d+) \| (.+?) \| (.+?) \|$', re.M)


def read_runs(text):
    """Runs by images, kind of step and name, then by seed."""
    runs = defaultdict(dict)
    for line in text.splitlines():
        run = json.loads(line)
        runs[run['set'], run['steps'], run['name']][run['seed']] = run
    return runs


def difference(runs, key, metric, digits):
    """Mean paired difference from the runs without memory, and its standard error."""
    results, baseline = runs[key], runs[(*key[:2], 'none')]
    values = [
        results[seed][metric] - baseline[seed][metric]
        for seed in sorted(results.keys() & baseline.keys())
    ]
    text = f'{statistics.mean(values):+.{digits}f}'
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        text += f' ± {error:.{digits}f}'
    return len(values), text


def wrong_rows(page, runs):
    """Rows that differ from the results; and the number of all rows."""
    wrong, rows = [], ROW.findall(page)
    for *key, count, top1, nll in rows:
        pairs, expected = difference(runs, tuple(key), 'top1', 2)
        figures = (str(pairs), expected, difference(runs, tuple(key), 'nll', 3)[1])
        if figures != (count, top1, nll):
            wrong.append((key, figures))
    return wrong, len(rows)


@pytest.fixture(scope='module')
def page():
    return Path('docs/memory_bank.md').read_text('utf-8')


@pytest.fixture(scope='module')
def runs():
    return read_runs(RESULTS.read_text('utf-8'))


def test_tables_are_those_of_the_results(page, runs):
    wrong, count = wrong_rows(page, runs)
    assert not wrong
    assert count > 20


def test_a_changed_figure_is_seen(page, runs):
    match = ROW.search(page)
    changed = page[: match.start(5)] + '+9.99' + page[match.end(5) :]
    assert len(wrong_rows(changed, runs)[0]) == 1
