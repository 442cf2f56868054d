"""Table and picture of `compare`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from rich.table import Table

from .records import MIB

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def group_results(results: Sequence[dict]) -> dict[str, list[dict]]:
    """Results by the name of their entry."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result['name'], []).append(result)
    return groups


def make_table(results: Sequence[dict]) -> Table:
    """One row an entry: metrics as mean and standard deviation, memory, time."""
    groups = group_results(results)
    metrics = _metrics(results)
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
    rows = _rows(group_results(results), _metrics(results))
    return [f'| {" | ".join(row[:-2])} |' for row in rows]


def _metrics(results: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(key for result in results for key in result['metrics']))


def _rows(groups: dict[str, list[dict]], metrics: Sequence[str]) -> list[list[str]]:
    rows = []
    base = next(iter(groups.values()))
    for name, group in groups.items():
        values = [_spread([r['metrics'][key] for r in group]) for key in metrics]
        difference = _mean(group, metrics[0]) - _mean(base, metrics[0])
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


def _mean(group: Sequence[dict], metric: str) -> float:
    return statistics.mean(result['metrics'][metric] for result in group)


def _seconds(group: Sequence[dict]) -> float:
    return statistics.median(result['step_seconds'] for result in group)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    digits = 3 if mean > 1 else 4
    if len(values) == 1:
        return f'{mean:.{digits}f}'
    return f'{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}'


def draw_comparison(results: Sequence[dict], path: Path) -> None:
    """Draws the network's own loss over the training, every result, and its memory.

    Args:
        results: Results of all runs.
        path: PNG file.
    """
    groups, metric = group_results(results), _metrics(results)[0]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 4.5), layout='constrained', width_ratios=(3, 2, 2)
    )
    colours = plt.get_cmap('tab10' if len(groups) <= 10 else 'tab20').colors
    for index, (name, group) in enumerate(groups.items()):
        colour = colours[index % len(colours)]
        curves = np.array([result['curves']['loss'] for result in group])
        step = group[0]['curves']['step']
        left.plot(step, curves.mean(0), color=colour, label=name)
        left.fill_between(step, curves.min(0), curves.max(0), color=colour, alpha=0.15)
        values = [result['metrics'][metric] for result in group]
        mean, peak = _mean(group, metric), group[0]['peak_bytes'] / MIB
        middle.plot(values, [index] * len(values), 'o', color=colour, alpha=0.6)
        middle.plot(mean, index, '|', color=colour, markersize=24)
        right.plot([peak] * 2, [min(values), max(values)], color=colour)
        right.plot(peak, mean, 'o', color=colour)
    low, high = np.percentile([r['curves']['loss'] for r in results], (0, 90))
    left.set(
        xlabel='step',
        ylabel="the network's own loss",
        ylim=(low - 0.05 * (high - low), high),
        title='mean, least and greatest of the seeds',
    )
    left.legend(fontsize='small', ncols=-(-len(groups) // 10))
    middle.set(xlabel=metric, title='every seed, and the mean')
    middle.set_yticks(range(len(groups)), list(groups))
    middle.invert_yaxis()
    middle.grid(axis='x', alpha=0.3)
    right.set(xlabel='peak MiB', ylabel=metric, title='against memory')
    right.set_xlim(left=0)
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
