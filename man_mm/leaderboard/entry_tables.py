"""Tables of the leaderboard's entries, listed in `ENTRY_KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .entries import compare_with_baseline, of_method
from .tables import TableError, table_lines

_DIGITS = {'PSNR': 3, 'SSIM': 4, 'mAP': 3, 'AP50': 3, 'top-1': 2, 'top-1 error': 2}


def entry_table(entries: Sequence[dict], folder: str) -> Iterator[str]:
    """The entries of a folder of ``configs``: accuracy, and the peak as a ratio."""
    by_id = {entry['id']: entry for entry in entries}
    shown = of_method(entries, folder)
    if not shown:
        yield 'No result is on the leaderboard yet.'
        return
    yield from table_lines(
        '| model | data | method | metric | K | value | end-to-end | gain | memory |',
        (_entry_row(entry, by_id) for entry in shown),
        left=4,
    )


def _entry_row(entry: dict, by_id: dict[str, dict]) -> str:
    name, metric = next(iter(entry['metrics'].items()))
    baseline = by_id[entry['baseline']]
    found = compare_with_baseline(entry, baseline)
    cells = [
        entry['model'],
        entry['dataset'],
        entry['method'],
        name,
        str(entry['modules']['K']) if entry['modules'] else '',
        format_metric(name, metric),
        format_metric(name, baseline['metrics'][name]),
        f'{found["gains"][name]:+.{_DIGITS[name]}f}',
        f'{found["memory"]:.3f}' if 'memory' in found else '',
    ]
    return f'| {" | ".join(cells)} |'


def claims_table(entries: Sequence[dict], ids: str) -> Iterator[str]:
    """Entries beside their baselines: memory, time of a step and the first metric."""
    by_id = {entry['id']: entry for entry in entries}
    if unknown := [name for name in ids.split() if name not in by_id]:
        raise TableError(f'<!-- results: claims {ids} -->: there is no {unknown[0]}.')
    yield from table_lines(
        '| | method | memory | time of a step | accuracy | of end-to-end |',
        (_claim(by_id[name], by_id) for name in ids.split()),
        left=2,
    )


def _claim(entry: dict, by_id: dict[str, dict]) -> str:
    baseline = by_id[entry['baseline']]
    found = compare_with_baseline(entry, baseline)
    height, width = entry['resolution']
    images = 'one image' if entry['batch'] == 1 else f'{entry["batch"]} images'
    cells = [
        f'{entry["model"]}, {images} of {height}×{width}',
        entry['method'],
        *(f'{found[k]:.3f}' if k in found else '' for k in ('memory', 'time')),
    ]
    if entry['metrics']:
        name, metric = next(iter(entry['metrics'].items()))
        cells += [
            f'{name} {format_metric(name, metric)}, {entry["dataset"]}',
            format_metric(name, baseline['metrics'][name]),
        ]
    else:
        cells += ['', '']
    return f'| {" | ".join(cells)} |'


def format_metric(name: str, metric: dict) -> str:
    """Mean and, of several seeds, standard deviation."""
    digits, std = _DIGITS[name], metric.get('std')
    spread = '' if std is None else f' ± {std:.{digits}f}'
    return f'{metric["mean"]:.{digits}f}{spread}'


# Each kind of table, by the word in its marker.
ENTRY_KINDS: dict[str, Callable] = {'entries': entry_table, 'claims': claims_table}
