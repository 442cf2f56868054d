"""The table of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from .records import MIB


def group_results(results: Sequence[dict]) -> dict[str, list[dict]]:
    """Results by the name of their entry."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result['name'], []).append(result)
    return groups


def make_table(results: Sequence[dict]) -> Table:
    """One row an entry: metrics as mean and standard deviation, memory, time."""
    groups = group_results(results)
    metrics = metric_names(results)
    seeds = sorted({result['seed'] for result in results})
    table = Table(title=f'seeds {", ".join(map(str, seeds))}')
    table.add_column('')
    columns = [*metrics, f'{metrics[0]} to the first', 'peak MiB', 'ratio']
    for column in [*columns, 'step s', 'ratio']:
        table.add_column(column, justify='right')
    for row in _rows(groups, metrics):
        table.add_row(*row)
    return table


def markdown_rows(results: Sequence[dict]) -> list[str]:
    """The rows of the table, as they stand in the documents.

    Without times, since other trainings may have run beside: `benchmark`
    measures those, in turn.
    """
    rows = _rows(group_results(results), metric_names(results))
    return [f'| {" | ".join(row[:-2])} |' for row in rows]


def metric_names(results: Sequence[dict]) -> list[str]:
    """The metrics of any result, in the order in which they come."""
    return list(dict.fromkeys(key for result in results for key in result['metrics']))


def _rows(groups: dict[str, list[dict]], metrics: Sequence[str]) -> list[list[str]]:
    rows = []
    base = next(iter(groups.values()))
    for name, group in groups.items():
        values = [spread([r['metrics'][key] for r in group]) for key in metrics]
        difference = mean_of(group, metrics[0]) - mean_of(base, metrics[0])
        peak, seconds = group[0]['peak_bytes'], _seconds(group)
        rows.append(
            [
                name if len(group) == len(base) else f'{name} ({len(group)} runs)',
                *values,
                f'{difference:+.3f}',
                f'{peak / MIB:.1f}',
                f'{peak / base[0]["peak_bytes"]:.3f}',
                f'{seconds:.3f}',
                f'{seconds / _seconds(base):.3f}',
            ]
        )
    return rows


def mean_of(group: Sequence[dict], metric: str) -> float:
    """A metric's mean over the seeds of an entry."""
    return statistics.mean(result['metrics'][metric] for result in group)


def _seconds(group: Sequence[dict]) -> float:
    return statistics.median(result['step_seconds'] for result in group)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of a metric."""
    mean = statistics.mean(values)
    digits = 3 if mean > 1 else 4
    if len(values) == 1:
        return f'{mean:.{digits}f}'
    return f'{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}'
