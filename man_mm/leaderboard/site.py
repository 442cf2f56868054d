"""The leaderboard's pages of the site; docs/site/hooks.py gives them to mkdocs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from man_mm.benchmark.records import MIB

from .charts import draw_curves, draw_split, draw_steps
from .commands import present_command
from .entries import (
    FIELDS,
    LOWER_IS_BETTER,
    RESULTS,
    TASKS,
    compare_with_baseline,
    raw_kind,
    read_raw,
)
from .entry_tables import format_metric

TEMPLATES = Path(__file__).with_name('templates')
ASSETS = ('board.css', 'board.js', 'front.js')
UNITS = {'PSNR': 'dB', 'top-1': '%', 'top-1 error': '%'}
# Methods with a colour of their own; all others share the one after these.
_METHODS = ('end-to-end', 'checkpointing', 'MAN', 'DGL', 'DGL-style', 'InfoPro')
_METHODS += ('AugLocal', 'Momentum', 'PredSim', 'HPFF', 'exact steps', 'MAN, joint')


class BoardPage(NamedTuple):
    """A page of the leaderboard.

    Attributes:
        title: For the window and the search.
        content: What stands in the page.

    Both are HTML.
    """

    title: str
    content: str


def render_pages(entries: Sequence[dict], root: Path) -> dict[str, BoardPage]:
    """Renders the table of all entries, and a page for each.

    Args:
        entries: All entries, which must be valid.
        root: The repository.

    Returns:
        Pages by their places: ``index``, and ``entries/<id>`` for each entry.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = make_rows(entries)
    shared = dict(units=UNITS, tasks=TASKS)
    content = environment.get_template('board.html').render(
        **shared,
        rows=rows,
        choices=_choices(rows),
        gains=_gain_names(rows),
        data=json.dumps(rows).replace('<', r'\u003c'),
    )
    pages = {'index': BoardPage('Leaderboard', content)}
    template = environment.get_template('entry.html')
    by_id = {row['id']: row for row in rows}
    raw = {
        entry['id']: [
            read_raw(root / RESULTS / name) for name in entry.get('sources', ())
        ]
        for entry in entries
    }
    for entry in entries:
        row = by_id[entry['id']]
        content = template.render(
            **shared,
            entry=dict.fromkeys((*FIELDS, 'reference')) | entry,
            command=present_command(entry.get('command') or ''),
            row=row,
            beside=[other for other in rows if other['group'] == row['group']],
            charts=_charts(row, by_id.get(row['baseline']), raw),
            seeds=_seeds(raw[entry['id']]),
            exactness=_exactness(raw[entry['id']]),
        )
        title = html.escape(f'{row["method"]}, {row["model"]}')
        pages[f'entries/{entry["id"]}'] = BoardPage(title, content)
    return pages


def make_rows(entries: Sequence[dict]) -> list[dict]:
    """What tables and plots show of each entry; the least memory first."""
    by_id = {entry['id']: entry for entry in entries}
    rows = [_row(entry, by_id) for entry in entries]

    def order(row: dict) -> tuple:
        memory = row['memory']
        return row['is_baseline'], memory is None, memory, row['id']

    return sorted(rows, key=order)


def _row(entry: dict, by_id: dict[str, dict]) -> dict:
    found = compare_with_baseline(entry, by_id.get(entry.get('baseline')))
    memory, seconds = entry.get('memory'), entry.get('step_seconds')
    size = entry.get('resolution')
    batch = entry.get('batch')
    images = [f'{batch} image{"s" if batch > 1 else ""}'] if batch else []
    images += [f'{size[0]}×{size[1]}'] if size else []
    method = entry['method']
    return dict(
        id=entry['id'],
        **{key: entry[key] for key in ('task', 'model', 'dataset', 'method', 'kind')},
        colour=_METHODS.index(method) if method in _METHODS else len(_METHODS),
        options=_own_options(entry, by_id.get(entry.get('baseline'))),
        K=(entry.get('modules') or {}).get('K'),
        images=' of '.join(images),
        device=entry.get('device') or 'not stated',
        precision=entry.get('precision'),
        is_baseline=entry['method'] == 'end-to-end' and not entry.get('baseline'),
        baseline=entry.get('baseline'),
        group=entry.get('baseline') or entry['id'],
        memory=found.get('memory'),
        peak=memory and memory['peak'],
        peak_text=format_bytes(memory['peak']) if memory else None,
        time=found.get('time'),
        seconds_text=f'{seconds["median"]:.3g} s' if seconds else None,
        flops=found.get('flops'),
        metrics={k: format_metric(k, m) for k, m in entry['metrics'].items()},
        # An error and an accuracy gain in the same unit.
        gains={
            key.removesuffix(' error') if key in LOWER_IS_BETTER else key: gain
            for key, gain in found['gains'].items()
        },
    )


def _own_options(entry: dict, baseline: dict | None) -> list[str]:
    """Options that the baseline does not have, and that the method does not say."""
    if baseline is None:
        return []
    shared = {*baseline.get('options', ()), entry['method']}
    return [option for option in entry.get('options', ()) if option not in shared]


def format_bytes(size: int) -> str:
    """Bytes in MiB, or in GiB from 1 GiB on."""
    return f'{size / MIB:.1f} MiB' if size < 2**30 else f'{size / 2**30:.2f} GiB'


def _choices(rows: Iterable[dict]) -> dict[str, list[str]]:
    """The values by which entries can be filtered, by key."""
    keys = ('model', 'dataset', 'method', 'device', 'kind')
    return {key: sorted({row[key] for row in rows}, key=str.lower) for key in keys}


def _gain_names(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row['gains']))


def _charts(
    row: dict, base: dict | None, raw: dict[str, list[dict]]
) -> dict[str, dict]:
    """What an entry's page draws: the peak's parts, steps and curves."""
    shown = [r for r in (row, base) if r is not None]
    steps = {
        r['id']: next((x for x in raw[r['id']] if raw_kind(x) == 'step'), None)
        for r in shown
    }
    runs = {r['id']: [x for x in raw[r['id']] if raw_kind(x) == 'run'] for r in shown}
    splits = [
        (r, (steps[r['id']] or (runs[r['id']] or [{}])[0]).get('kinds')) for r in shown
    ]
    charts = dict(
        split=draw_split([(r, kinds) for r, kinds in splits if kinds]),
        steps=draw_steps(
            [
                (r, steps[r['id']]['seconds'])
                for r in shown
                if steps[r['id']] and r['seconds_text']
            ]
        ),
        curves=draw_curves([(r, runs[r['id']]) for r in shown if runs[r['id']]]),
    )
    return {name: chart for name, chart in charts.items() if chart}


def _seeds(records: Sequence[dict]) -> list[dict]:
    """Metrics of every run, as they were logged."""
    runs = [record for record in records if raw_kind(record) == 'run']
    rows = [dict(seed=run['seed'], values=run['metrics']) for run in runs]
    return sorted(rows, key=lambda row: row['seed'])


def _exactness(records: Sequence[dict]) -> str | None:
    """How far the weights after a step are from those of the reference, in words."""
    step = next((record for record in records if raw_kind(record) == 'step'), None)
    if step is None:
        return None
    distance, reference = step['exactness'], step['reference']
    if reference == step['scheme']:
        return 'a computation of its own'
    if distance == 0:
        return f'bit for bit {reference}'
    return f'{distance:.1e} of an update from {reference}'
