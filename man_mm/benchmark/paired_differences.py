"""Paired differences of two methods over seeds, and what they allow to claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy import stats

from .comparison_report import group_results, metric_names

# Of docs/protocol.md, in units of each metric.
MARGINS = {'coco/bbox_mAP': 0.003, 'accuracy/top1': 0.3, 'PSNR': 0.03}


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference to a baseline, with its 95 % confidence interval.

    Attributes:
        seeds: The seeds that both methods were trained with.
        mean: Mean over the seeds of result minus baseline, in units of the metric.
        low: Lower end of the interval; minus infinity with a single seed.
        high: Upper end of the interval; infinity with a single seed.
    """

    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float

    def verdict(self, margin: float) -> str:
        """What the interval allows to claim.

        Args:
            margin: Greatest loss that still counts as none, in units of the metric.

        Returns:
            ``'better'`` if the whole interval is above zero, ``'not inferior'`` if it
            is above ``-margin``, ``'inferior'`` if it is below ``-margin``, otherwise
            ``'undecided'``.

        Raises:
            ValueError: If ``margin`` is negative.

        Examples:
            >>> PairedDifference((0, 1), mean=0.1, low=-0.2, high=0.4).verdict(0.3)
            'not inferior'
        """
        if margin < 0:
            raise ValueError(f'margin must be at least 0, got {margin}.')
        if self.low > 0:
            return 'better'
        if self.low > -margin:
            return 'not inferior'
        return 'inferior' if self.high < -margin else 'undecided'


def paired_difference(
    baseline: Mapping[int, float], results: Mapping[int, float]
) -> PairedDifference:
    """Compares results that share seeds: initial weights and order of the data.

    The interval is that of Student's t-distribution for the mean of the differences,
    which is narrower than one of two independent means where seeds matter.

    Args:
        baseline: A metric of which more is better, by seed.
        results: The same metric of another method, by seed.

    Raises:
        ValueError: If they share no seed.

    Examples:
        >>> difference = paired_difference({0: 80.0, 1: 82.0}, {0: 81.0, 1: 83.2})
        >>> round(difference.mean, 2), round(difference.low, 2)
        (1.1, -0.17)
    """
    seeds = tuple(sorted(baseline.keys() & results.keys()))
    if not seeds:
        raise ValueError(
            f'the baseline has the seeds {sorted(baseline)}, the results have '
            f'{sorted(results)}: without a seed in common there is no pair.'
        )
    values = [results[seed] - baseline[seed] for seed in seeds]
    mean, half = statistics.mean(values), math.inf
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
        half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return PairedDifference(seeds, mean, mean - half, mean + half)


def paired_differences(results: Sequence[dict]) -> dict[str, PairedDifference]:
    """The difference of each method from the first one, in the first metric.

    Args:
        results: What the runs of `compare` wrote, those of the baseline first.

    Raises:
        ValueError: If a method shares no seed with the first one.
    """
    metric = metric_names(results)[0]
    scores = {
        name: {result['seed']: result['metrics'][metric] for result in group}
        for name, group in group_results(results).items()
    }
    (_, baseline), *others = scores.items()
    return {name: paired_difference(baseline, values) for name, values in others}


def difference_rows(
    results: Sequence[dict], margin: float | None = None
) -> tuple[list[str], list[list[str]]]:
    """A row for each method but the first, which is the baseline.

    Args:
        results: What the runs of `compare` wrote, those of the baseline first.
        margin: See `PairedDifference.verdict`. Defaults to that of `MARGINS`; without
            one there are no verdicts.

    Returns:
        The head of the table, and its rows.
    """
    metric = metric_names(results)[0]
    margin = MARGINS.get(metric) if margin is None else margin
    head = [f'{metric} to {results[0]["name"]}', 'seeds', 'mean', '95 % interval']
    head += [] if margin is None else [f'verdict at a margin of {margin:g}']
    rows = []
    for name, difference in paired_differences(results).items():
        mean, low, high = (
            _signed(x, margin)
            for x in (difference.mean, difference.low, difference.high)
        )
        interval = f'{low} to {high}' if len(difference.seeds) > 1 else ''
        row = [name, str(len(difference.seeds)), mean, interval]
        row += [] if margin is None else [difference.verdict(margin)]
        rows.append(row)
    return head, rows


def make_difference_table(
    results: Sequence[dict], margin: float | None = None
) -> Table:
    """`difference_rows`, as a table for the screen."""
    head, rows = difference_rows(results, margin)
    table = Table(title=f'paired differences: {head[0]}')
    for index, column in enumerate(['', *head[1:]]):
        table.add_column(column, justify='right' if 0 < index < 4 else 'left')
    for row in rows:
        table.add_row(*row)
    return table


def _signed(value: float, margin: float | None) -> str:
    """A difference, to the second digit of the margin."""
    if not margin:
        return f'{value:+.4g}'
    return f'{value:+.{1 - math.floor(math.log10(margin))}f}'
