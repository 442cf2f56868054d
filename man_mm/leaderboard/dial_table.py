"""What each setting of the dial costs, and what accuracy it reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from man_mm.benchmark.comparison_report import group_results, metric_names, spread
from man_mm.benchmark.paired_differences import difference_rows
from man_mm.benchmark.schemes import END_TO_END, EXACT, JOINT, LOCAL

_KEY = 'optim_wrapper.local_learning.'


def scheme_shares(result: dict) -> dict[str, float]:
    """The kinds of steps of a training, with their shares of its iterations.

    Args:
        result: What a run of `compare` wrote.

    Returns:
        Shares, which add up to 1, by the scheme of `benchmark`.

    Examples:
        >>> options = ['optim_wrapper.local_learning.end_to_end_from=0.2']
        >>> scheme_shares(dict(cuts=['backbone.layer1'], options=options))
        {'local': 0.2, 'exact': 0.8}
    """
    if not result['cuts']:
        return {END_TO_END: 1.0}
    options = dict(option.split('=', 1) for option in result['options'])
    start = options.get(f'{_KEY}end_to_end_from', 'None')
    if start == 'None':
        return {LOCAL: 1.0}
    weight = options.get(f'{_KEY}local_loss_weight', '0')
    later = JOINT if weight == 'balanced' or float(weight) else EXACT
    shares = {LOCAL: float(start), later: 1 - float(start)}
    return {scheme: share for scheme, share in shares.items() if share}


def dial_rows(
    results: Sequence[dict], records: Sequence[dict]
) -> tuple[list[str], list[list[str]]]:
    """A row for each way to train, from the baseline to the fastest.

    Args:
        results: What the runs of `compare` wrote, those of the baseline first.
        records: What `benchmark` measured of the same network: all kinds of steps of
            these trainings, and others, of which exact ones need no training: they
            have the gradients of the baseline.

    Returns:
        The head of the table, and its rows: peak, time and FLOPs as ratios, accuracy
        as mean and standard deviation, and the difference from the baseline.
    """
    costs = {record['scheme']: record for record in records}
    metric = metric_names(results)[0]
    differences = {name: rest for name, *rest in difference_rows(results)[1]}
    head = ['', 'peak', 'time', 'FLOPs', metric]
    head += ['seeds', 'difference', '95 % interval', 'verdict']

    def row(name: str, shares: dict[str, float], accuracy: str) -> list[str]:
        cells = [name, *(f'{x:.3f}' for x in _ratios(costs, shares)), accuracy]
        cells += differences.get(name, ())
        return cells + [''] * (len(head) - len(cells))

    groups = group_results(results)
    shares = {name: scheme_shares(group[0]) for name, group in groups.items()}
    trained = {
        name: row(name, shares[name], spread([r['metrics'][metric] for r in group]))
        for name, group in groups.items()
    }
    others = [
        row(scheme, {scheme: 1.0}, 'its gradients' if _is_exact(scheme) else '')
        for scheme in costs
        if {scheme: 1.0} not in shares.values()
    ]
    first, *rest = trained
    rest.sort(key=lambda name: -_ratios(costs, shares[name])[1])
    return head, [trained[first], *others, *(trained[name] for name in rest)]


def _ratios(
    costs: Mapping[str, dict], shares: Mapping[str, float]
) -> tuple[float, float, float]:
    """Peak, time and FLOPs of a training: the highest peak, and means of its steps."""
    peak = max(costs[scheme]['peak_ratio'] for scheme in shares)
    time, flops = (
        sum(share * costs[scheme][key] for scheme, share in shares.items())
        for key in ('time_ratio', 'flops_ratio')
    )
    return peak, time, flops


def _is_exact(scheme: str) -> bool:
    return scheme.startswith((END_TO_END, EXACT))
