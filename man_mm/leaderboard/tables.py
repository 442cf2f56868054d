"""Tables in documents and metafiles that are generated from result files.

In a document, ``<!-- results: KIND FOLDER -->`` and ``<!-- end of results -->`` enclose
a table of a folder of ``benchmarks/results``. `KINDS` lists the kinds. Two kinds are of
the leaderboard's entries: ``entries FOLDER``, of a folder of ``configs``, and
``claims ID ...``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from .entries import RESULTS, compare_with_baseline, of_method

MIB = 2**20
DOCUMENTS = ('README.md', 'docs/*.md', 'configs/*/README.md')
METAFILES = 'configs/*/metafile.yml'
_BEGIN, _END = '<!-- results: {} -->', '<!-- end of results -->'
_BLOCK = re.compile(
    r'^<!-- results: (.+?) -->\n.*?^<!-- end of results -->$', re.DOTALL | re.MULTILINE
)
# A model's config and metadata, behind which its results are written.
_MODEL = re.compile(
    r'^    Config: (?P<config>\S+)\n(?:    Metadata:\n(?:      .*\n)*)?', re.MULTILINE
)
_META_BEGIN, _META_END = '    # from the leaderboard', '    # end of results'
# OpenMMLab's words for a task and its metrics; those of detection are in percent.
_TASKS = {
    'detection': 'Object Detection',
    'classification': 'Image Classification',
    'super-resolution': 'Image Super-Resolution',
}
_METAFILE_METRICS = {'mAP': 'box AP', 'AP50': 'box AP50', 'top-1': 'Top 1 Accuracy'}
_DIGITS = {'PSNR': 3, 'SSIM': 4, 'mAP': 3, 'AP50': 3, 'top-1': 2, 'top-1 error': 2}


class TableError(ValueError):
    """A marker that names no results."""


def update_documents(root: Path, entries: Sequence[dict]) -> dict[Path, str]:
    """The documents and metafiles as they should be.

    Args:
        root: The repository.
        entries: All entries of the leaderboard.

    Returns:
        Their text by path.

    Raises:
        TableError: If a marker names no results.
    """
    texts = {}
    for path in documents(root):
        text = path.read_text('utf-8')
        try:
            texts[path] = _BLOCK.sub(lambda m: _block(m[1], root, entries), text)
        except TableError as error:
            raise TableError(f'{path.relative_to(root)}: {error}') from error
    for path in sorted(root.glob(METAFILES)):
        texts[path] = update_metafile(path.read_text('utf-8'), entries)
    return texts


def documents(root: Path) -> list[Path]:
    """The documents whose numbers come from results."""
    return [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def unmarked_numbers(text: str) -> list[str]:
    """Rows with measured numbers that stand outside of the markers.

    Rows that name a setting, in backticks, are none.
    """
    rows = re.findall(r'^\|.*\d\.\d+.*\|$', _BLOCK.sub('', text), re.MULTILINE)
    return [row for row in rows if '`' not in row]


def unclosed_markers(text: str) -> list[str]:
    """Lines with a marker that has no partner."""
    text = _BLOCK.sub('', text)
    return re.findall(r'^<!-- (?:results:|end of results).*$', text, re.MULTILINE)


def _block(name: str, root: Path, entries: Sequence[dict]) -> str:
    kind, _, folder = name.partition(' ')
    if kind not in (*KINDS, *ENTRY_KINDS):
        known = ', '.join((*KINDS, *ENTRY_KINDS))
        raise TableError(f'<!-- results: {name} -->: write one of {known}.')
    if kind in ENTRY_KINDS:
        lines = list(ENTRY_KINDS[kind](entries, folder))
    else:
        path = root / RESULTS / folder
        if not any(path.glob('*.json')):
            raise TableError(f'<!-- results: {name} -->: {RESULTS / folder} has none.')
        lines = KINDS[kind](path)
    return '\n'.join([_BEGIN.format(name), *lines, _END])


def _table(columns: str, rows: Iterable[str], left: int = 1) -> list[str]:
    """A table of which the first ``left`` columns are text, and the others numbers."""
    count = columns.count('|') - 1
    line = '|' + '---|' * left + '---:|' * (count - left)
    return [columns, line, *rows]


def _steps(folder: Path) -> list[str]:
    from man_mm.benchmark.records import markdown_rows, read_records

    columns = '| scheme | peak | ratio | step | ratio | FLOPs |'
    return _table(columns, markdown_rows(read_records(folder)))


def _peaks(folder: Path) -> list[str]:
    """What peaks consist of, in MiB."""
    from man_mm.benchmark.records import read_records

    rows, records = [], read_records(folder)
    kinds = list(dict.fromkeys(kind for record in records for kind in record['kinds']))
    for record in records:
        sizes = [f'{record["kinds"].get(kind, 0) / MIB:.1f}' for kind in kinds]
        total = f'{record["peak"] / MIB:.1f} | {record["peak_ratio"]:.3f}'
        rows.append(f'| {record["scheme"]} | {total} | {" | ".join(sizes)} |')
    return _table(f'| scheme | peak | ratio | {" | ".join(kinds)} |', rows)


def _training(folder: Path) -> list[str]:
    from man_mm.benchmark.comparison import read_folder
    from man_mm.benchmark.comparison_report import markdown_rows

    results = read_folder(folder)
    metrics = ' | '.join(dict.fromkeys(key for r in results for key in r['metrics']))
    columns = f'| | {metrics} | to the first | peak MiB | ratio |'
    return _table(columns, markdown_rows(results))


def _pipeline(folder: Path) -> list[str]:
    from man_mm.benchmark.pipeline_costs import measured_rows, read_records

    columns = (
        '| images | processes | speed-up, processor time | predicted | slowdown '
        '| speed-up, wall | one process, all processors, wall | sent a batch |'
    )
    return _table(columns, measured_rows(read_records(folder)))


def _predictions(folder: Path) -> list[str]:
    from man_mm.benchmark.pipeline_costs import predicted_rows, read_records

    lines = _table(
        '| images | devices | parameters | predicted speed-up |',
        predicted_rows(read_records(folder)),
    )
    lines[1] = '|---|---:|---|---:|'
    return lines


def _rates(folder: Path) -> list[str]:
    """Results of runs called ``NAME rate RATE``: a row for each name."""
    from man_mm.benchmark.comparison import read_folder

    table: dict[str, dict[str, float]] = {}
    for result in read_folder(folder):
        name, _, rate = result['name'].partition(' rate ')
        table.setdefault(name, {})[rate] = next(iter(result['metrics'].values()))
    rates = sorted({rate for row in table.values() for rate in row}, key=float)
    rows = []
    for name, row in table.items():
        best = max(row.values())
        digits = 2 if best > 1 else 3  # percent, or a share of 1
        cells = [f'{row[r]:.{digits}f}' if r in row else '' for r in rates]
        cells = [f'**{x}**' if x == f'{best:.{digits}f}' else x for x in cells]
        rows.append(f'| {name} | {" | ".join(cells)} |')
    return _table(f'| rate | {" | ".join(rates)} |', rows)


def _probes(folder: Path) -> list[str]:
    from man_mm.benchmark.stage_probes import probe_rows, read_folder

    results = read_folder(folder)
    columns = f'| | {" | ".join(results[0]["accuracies"])} |'
    return _table(columns, (f'| {" | ".join(row)} |' for row in probe_rows(results)))


def _demo(folder: Path) -> list[str]:
    """Results of `demo` by seed, their mean and spread."""
    paths = sorted(folder.glob('digits_*.json'))
    records = [json.loads(path.read_text('utf-8')) for path in paths]
    rows = []
    for record in records:
        for scheme, row in record['results'].items():
            cells = f'{row["mAP"]:.3f} | {row["AP50"]:.3f}'
            rows.append(f'| {record["seed"]} | {scheme} | {cells} |')
    for scheme in records[0]['results']:
        cells = []
        for key in ('mAP', 'AP50'):
            values = [record['results'][scheme][key] for record in records]
            cells.append(
                f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}'
            )
        rows.append(f'| mean | {scheme} | {cells[0]} | {cells[1]} |')
    return _table('| seed | | mAP | AP50 |', rows, left=2)


def entry_table(entries: Sequence[dict], folder: str) -> Iterator[str]:
    """The entries of a folder of ``configs``: accuracy, and the peak as a ratio."""
    by_id = {entry['id']: entry for entry in entries}
    shown = of_method(entries, folder)
    if not shown:
        yield 'No result is on the leaderboard yet.'
        return
    yield from _table(
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
    yield from _table(
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


def update_metafile(text: str, entries: Sequence[dict]) -> str:
    """Writes the leaderboard's results into a metafile, in OpenMMLab's vocabulary.

    Args:
        text: The metafile.
        entries: All entries of the leaderboard.

    Returns:
        The metafile with ``Results`` for each config that has an entry as it is,
        without options of its own.
    """
    block = rf'^{_META_BEGIN}\n.*?^{_META_END}\n'
    text = re.sub(block, '', text, flags=re.MULTILINE | re.DOTALL)
    by_config: dict[str, list[dict]] = {}
    for entry in entries:
        # A model has one result on a data set: that of its config as it is.
        if entry['metrics'] and entry.get('baseline') and not entry.get('options'):
            by_config.setdefault(entry.get('config'), []).append(entry)

    def with_results(match: re.Match) -> str:
        found = by_config.get(match['config'])
        if not found:
            return match[0]
        lines = yaml.safe_dump(
            {'Results': [_metafile_result(entry) for entry in found]},
            sort_keys=False,
            allow_unicode=True,
        )
        indented = ''.join(f'    {line}\n' for line in lines.splitlines())
        return f'{match[0]}{_META_BEGIN}\n{indented}{_META_END}\n'

    return _MODEL.sub(with_results, text)


def _metafile_result(entry: dict) -> dict:
    metrics = {}
    for name, metric in entry['metrics'].items():
        percent = 100 if name in ('mAP', 'AP50') else 1
        digits = 1 if percent == 100 else 4
        metrics[_METAFILE_METRICS.get(name, name)] = round(
            percent * metric['mean'], digits
        )
    task = _TASKS[entry['task']]
    return {'Task': task, 'Dataset': entry['dataset'], 'Metrics': metrics}


# Each kind of table, by the word in its marker.
KINDS: dict[str, Callable] = {
    'steps': _steps,
    'peaks': _peaks,
    'training': _training,
    'rates': _rates,
    'probes': _probes,
    'demo': _demo,
    'pipeline': _pipeline,
    'predictions': _predictions,
}
ENTRY_KINDS: dict[str, Callable] = {'entries': entry_table, 'claims': claims_table}
