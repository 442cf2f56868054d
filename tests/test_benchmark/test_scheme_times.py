"""Which times of schemes are kept."""

import pytest
from rich.console import Console

from man_mm.benchmark import scheme_costs


@pytest.mark.parametrize(
    ('seconds', 'kept'),
    [
        ([1.0, 1.05, 1.1], True),
        ([1.0, 1.0, 1.4], False),
        ([1.0, 1.0, 1.0, 1.0, 1.4], True),  # once does not count
        ([1.0, 2.0], True),  # too few to tell
        ([], True),
    ],
)
def test_times_of_a_busy_machine_are_dropped(seconds, kept, capsys):
    results = {name: dict(seconds=seconds) for name in ('end-to-end', 'local')}
    scheme_costs.drop_busy_times(results, Console())
    assert all(row['seconds'] == (seconds if kept else []) for row in results.values())
    told = ' '.join(capsys.readouterr().out.split())
    assert ('those of end-to-end differs by 20%' in told) != kept
