"""What each setting of the dial costs, and what accuracy it reaches."""

from __future__ import annotations

from collections.abc import Sequence

from man_mm.benchmark.comparison_report import group_results, metric_names, spread
from man_mm.benchmark.paired_differences import difference_rows

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
        return {'end-to-end': 1.0}
    options = dict(option.split('=', 1) for option in result['options'])
    start = options.get(f'{_KEY}end_to_end_from', 'None')
    if start == 'None':
        return {'local': 1.0}
    weight = options.get(f'{_KEY}local_loss_weight', '0')
    later = 'joint' if weight == 'balanced' or float(weight) else 'exact'
    shares = {'local': float(start), later: 1 - float(start)}
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
    _, differences = difference_rows(results)
    by_name = {name: rest for name, *rest in differences}
    groups = group_results(results)
    trained: dict[str, tuple[float, list[str]]] = {}
    used = set()
    for name, group in groups.items():
        shares = scheme_shares(group[0])
        used.update(shares if len(shares) == 1 else ())
        peak = max(costs[scheme]['peak_ratio'] for scheme in shares)
        time, flops = (
            sum(share * costs[scheme][key] for scheme, share in shares.items())
            for key in ('time_ratio', 'flops_ratio')
        )
        accuracy = spread([result['metrics'][metric] for result in group])
        cells = [f'{peak:.3f}', f'{time:.3f}', f'{flops:.3f}', accuracy]
        trained[name] = time, [name, *cells, *by_name.get(name, ['', '', '', ''])]
    first, *others = trained
    rows = [trained[first][1]]
    for scheme, record in costs.items():
        if scheme in used:
            continue
        cells = [f'{record[f"{key}_ratio"]:.3f}' for key in ('peak', 'time', 'flops')]
        is_exact = scheme.startswith(('end-to-end', 'exact'))
        accuracy = 'its gradients' if is_exact else ''
        rows.append([scheme, *cells, accuracy, '', '', '', ''])
    others.sort(key=lambda name: -trained[name][0])
    rows += [trained[name][1] for name in others]
    head = ['', 'peak', 'time', 'FLOPs', metric]
    return [*head, 'seeds', 'difference', '95 % interval', 'verdict'], rows
