"""Tables of result files: a function for each kind, listed in `KINDS`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from man_mm.benchmark import (
    card_report,
    comparison,
    comparison_report,
    pipeline_costs,
    stage_probes,
)
from man_mm.benchmark import records as step_records
from man_mm.benchmark.paired_differences import difference_rows
from man_mm.benchmark.records import MIB

from .dial_table import dial_rows


class TableError(ValueError):
    """A marker that names no results."""


def table_lines(columns: str, rows: Iterable[str], left: int = 1) -> list[str]:
    """A table of which the first ``left`` columns are text, and the others numbers."""
    count = columns.count('|') - 1
    line = '|' + '---|' * left + '---:|' * (count - left)
    return [columns, line, *rows]


def _cell_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of cells, of which the first of each row is text."""
    columns, *lines = (f'| {" | ".join(row)} |' for row in (head, *rows))
    return table_lines(columns, lines)


def _steps(folder: Path) -> list[str]:
    records = step_records.read_records(folder)
    times = 'step | ratio | ' if step_records.has_times(records) else ''
    columns = f'| scheme | peak | ratio | {times}FLOPs |'
    return table_lines(columns, step_records.markdown_rows(records))


def _peaks(folder: Path) -> list[str]:
    """What peaks consist of, in MiB."""
    rows, records = [], step_records.read_records(folder)
    kinds = list(dict.fromkeys(kind for record in records for kind in record['kinds']))
    for record in records:
        sizes = [f'{record["kinds"].get(kind, 0) / MIB:.1f}' for kind in kinds]
        total = f'{record["peak"] / MIB:.1f} | {record["peak_ratio"]:.3f}'
        rows.append(f'| {record["scheme"]} | {total} | {" | ".join(sizes)} |')
    return table_lines(f'| scheme | peak | ratio | {" | ".join(kinds)} |', rows)


def _training(folder: Path) -> list[str]:
    results = comparison.read_folder(folder)
    metrics = ' | '.join(dict.fromkeys(key for r in results for key in r['metrics']))
    columns = f'| | {metrics} | to the first | peak MiB | ratio |'
    return table_lines(columns, comparison_report.markdown_rows(results))


def _differences(folder: Path) -> list[str]:
    """Differences from the first method, paired by seed, and their verdicts."""
    return _cell_table(*difference_rows(comparison.read_folder(folder)))


def _dial(trainings: Path, steps: Path) -> list[str]:
    """Costs and accuracy of each setting of the dial."""
    results = comparison.read_folder(trainings)
    records = step_records.read_records(steps)
    if not step_records.has_times(records):
        raise TableError(f'{steps} has no times: set --repeats of benchmark.')
    return _cell_table(*dial_rows(results, records))


def _pipeline(folder: Path) -> list[str]:
    columns = (
        '| images | processes | speed-up, processor time | predicted | slowdown '
        '| speed-up, wall | one process, all processors, wall | sent a batch |'
    )
    records = pipeline_costs.read_records(folder)
    return table_lines(columns, pipeline_costs.measured_rows(records))


def _predictions(folder: Path) -> list[str]:
    lines = table_lines(
        '| images | devices | parameters | predicted speed-up |',
        pipeline_costs.predicted_rows(pipeline_costs.read_records(folder)),
    )
    lines[1] = '|---|---:|---|---:|'
    return lines


def _rates(folder: Path) -> list[str]:
    """Results of runs called ``NAME rate RATE``: a row for each name."""
    table: dict[str, dict[str, float]] = {}
    for result in comparison.read_folder(folder):
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
    return table_lines(f'| rate | {" | ".join(rates)} |', rows)


def _probes(folder: Path) -> list[str]:
    results = stage_probes.read_folder(folder)
    return _cell_table(
        ['', *results[0]['accuracies']], stage_probes.probe_rows(results)
    )


def _demo(folder: Path) -> list[str]:
    """Results of `demo` by seed, their mean and spread."""
    paths = sorted(folder.glob('digits_*.json'))
    records = [json.loads(path.read_text('utf-8')) for path in paths]
    schemes = [name for name, row in records[0]['results'].items() if 'mAP' in row]
    rows = []
    for record in records:
        for scheme in schemes:
            row = record['results'][scheme]
            cells = f'{row["mAP"]:.3f} | {row["AP50"]:.3f}'
            rows.append(f'| {record["seed"]} | {scheme} | {cells} |')
    for scheme in schemes:
        cells = []
        for key in ('mAP', 'AP50'):
            values = [record['results'][scheme][key] for record in records]
            cells.append(
                f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}'
            )
        rows.append(f'| mean | {scheme} | {cells[0]} | {cells[1]} |')
    return table_lines('| seed | | mAP | AP50 |', rows, left=2)


def _card_records(folder: Path) -> list[tuple[str, dict]]:
    paths = sorted(folder.glob('*.json'))
    return [(path.stem, json.loads(path.read_text('utf-8'))) for path in paths]


def _cards(folder: Path) -> list[str]:
    """Peaks in GiB, and the smallest card for each."""
    columns = '| | end to end | recomputed | exact | joint | local |'
    return table_lines(columns, card_report.card_rows(_card_records(folder)))


def _card_errors(folder: Path) -> list[str]:
    """Errors of counted peaks against those of computed steps."""
    columns = '| | end to end | recomputed | exact | joint | local | counted in |'
    return table_lines(columns, card_report.error_rows(_card_records(folder)))


def _published(folder: Path) -> list[str]:
    """Counted peaks of end-to-end training beside readings on GPUs."""
    columns = '| | counted, GiB | read on GPUs, GB | |'
    return table_lines(columns, card_report.published_rows(_card_records(folder)))


# Each kind of table, by the word in its marker.
KINDS: dict[str, Callable] = {
    'steps': _steps,
    'peaks': _peaks,
    'training': _training,
    'differences': _differences,
    'dial': _dial,
    'rates': _rates,
    'probes': _probes,
    'demo': _demo,
    'pipeline': _pipeline,
    'predictions': _predictions,
    'cards': _cards,
    'card-errors': _card_errors,
    'published': _published,
}
