"""Entries of the leaderboard, and the numbers in them that result files give.

An entry is a JSON file ``benchmarks/results/<task>/<id>.json``, described by
``benchmarks/entry.schema.json``. A measured one names its sources: one record of
`benchmark` (with results of `demo`, if there are any, for the
accuracy), or the runs of one entry of `compare`, one for each seed.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path('benchmarks/results')
TASKS = ('detection', 'classification', 'super-resolution')
# Of a measured entry, in the order in which they are written.
FIELDS = (
    'id kind task model dataset method options config modules batch resolution '
    'precision optimizer length device threads hardware memory flops step_seconds '
    'exactness metrics baseline sources versions commit date command notes'
).split()
PRECISIONS = ('bf16', 'fp16')
# How metrics are called on the board, by their names in the logs.
METRICS = {
    'PSNR': 'PSNR',
    'SSIM': 'SSIM',
    'mAP': 'mAP',
    'AP50': 'AP50',
    'coco/bbox_mAP': 'mAP',
    'coco/bbox_mAP_50': 'AP50',
    'pascal_voc/mAP': 'mAP',
    'pascal_voc/AP50': 'AP50',
    'accuracy/top1': 'top-1',
}
LOWER_IS_BETTER = ('top-1 error',)
_COSTS = {
    'memory': lambda entry: (entry.get('memory') or {}).get('peak'),
    'time': lambda entry: (entry.get('step_seconds') or {}).get('median'),
    'flops': lambda entry: entry.get('flops'),
}
DEMO_CONFIG = 'configs/man/retinanet_r18_man_demo.py'  # trained by `demo`
_SCHEME_OF_DEMO = {'local': 'local learning'}


class EntryError(ValueError):
    """Results that cannot be on the board; the message says why."""


def read_entries(root: Path) -> dict[Path, dict]:
    """Reads all entries.

    Args:
        root: The repository.

    Returns:
        Entries by their path, in the order of tasks and names.

    Raises:
        EntryError: If a file is not valid JSON.
    """
    paths = [
        path
        for task in TASKS
        for path in sorted((root / RESULTS / task).glob('*.json'), key=_in_order)
    ]
    return {path: _read_json(path) for path in paths}


def _in_order(path: Path) -> list:
    """Sorts numbers in names by their value: K 4 before K 16."""
    return [int(x) if x.isdigit() else x for x in re.split(r'(\d+)', path.stem)]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text('utf-8'))
    except json.JSONDecodeError as error:
        raise EntryError(f'{path} is not valid JSON: {error}.') from error


def read_raw(path: Path) -> dict:
    """Reads a result file.

    Raises:
        EntryError: If no tool wrote it whose results can be on the board.
    """
    if not path.is_file():
        raise EntryError(f'{path} does not exist.')
    record = _read_json(path)
    if not isinstance(record, dict) or not raw_kind(record):
        raise EntryError(f'{path} was not written by benchmark, compare or demo.')
    return record


def raw_kind(record: dict) -> str | None:
    """What a result file is: ``'step'``, ``'run'``, ``'demo'``, or None of these."""
    if 'scheme' in record and 'seconds' in record:
        return 'step'
    if 'curves' in record and 'metrics' in record:
        return 'run'
    return 'demo' if 'results' in record and 'seed' in record else None


def derive(records: Sequence[dict]) -> dict:
    """The fields of an entry that its sources give.

    Args:
        records: What `read_raw` returned for each source.

    Returns:
        Fields, None where the sources do not say.

    Raises:
        EntryError: If the sources do not belong to one entry.
    """
    by_kind = {
        kind: [record for record in records if raw_kind(record) == kind]
        for kind in ('step', 'run', 'demo')
    }
    runs = by_kind['run']
    if runs and len(runs) == len(records):
        return _from_runs(runs)
    if len(by_kind['step']) != 1 or runs:
        raise EntryError(
            'an entry comes from one record of the tool benchmark, with or without '
            'results of demo, or from runs of compare'
        )
    (step,) = by_kind['step']
    return _from_step(step) | dict(metrics=_metrics_of_demo(by_kind['demo'], step))


def _from_step(record: dict) -> dict:
    base, *options = record['scheme'].split('+')
    seconds, cuda = record['seconds'], record['cuda']
    number = next((int(x[2:]) for x in options if x.startswith('K=')), None)
    if base == 'end-to-end':
        modules = dict(K=1, cuts=[])
    elif 'cuts' in record:
        modules = dict(K=len(record['cuts']) + 1, cuts=record['cuts'])
    else:
        modules = number and dict(K=number, cuts=None)
    return dict(
        config=record['config'],
        options=[*options, *overrides(record)],
        modules=modules,
        batch=record['batch'],
        resolution=record['size'],
        precision=next((x for x in PRECISIONS if x in options), 'fp32'),
        device=record['device'].partition(':')[0],
        threads=record['threads'],
        memory=dict(
            peak=record['peak'],
            split=record['kinds'],
            allocated=cuda.get('allocated'),
            reserved=cuda.get('reserved'),
        ),
        flops=record['flops'],
        step_seconds=_times(seconds) if seconds else None,
        exactness=dict(distance=record['exactness'], reference=record['reference']),
        **_provenance(record),
        command=record['command'],
    )


def _times(seconds: list[float]) -> dict:
    return dict(
        median=statistics.median(seconds),
        least=min(seconds),
        greatest=max(seconds),
        steps=len(seconds),
    )


def overrides(record: dict) -> list[str]:
    """Settings that override a record's config; old files have them in the command."""
    if 'options' in record:
        return record['options']
    command = shlex.split(record['command'])
    if '--cfg-options' not in command:
        return []
    return command[command.index('--cfg-options') + 1 :]


def _provenance(record: dict) -> dict:
    keys = ('versions', 'hardware', 'commit', 'date')
    return {key: record.get(key) for key in keys}


def _metrics_of_demo(records: Sequence[dict], step: dict) -> dict:
    if records and step['config'] != DEMO_CONFIG:
        raise EntryError(f'the tool demo trains {DEMO_CONFIG}, not {step["config"]}')
    name = _SCHEME_OF_DEMO.get(step['scheme'], step['scheme'])
    rows = {record['seed']: record['results'].get(name) for record in records}
    if not all(rows.values()):
        raise EntryError(f'the tool demo has no results of {step["scheme"]!r}')
    keys = ('mAP', 'AP50') if rows else ()
    return {
        key: _metric({seed: row[key] for seed, row in rows.items()}) for key in keys
    }


def _from_runs(records: Sequence[dict]) -> dict:
    records = sorted(records, key=lambda record: record['seed'])
    first, seeds = records[0], [record['seed'] for record in records]
    settings = {
        (record['name'], record['config'], *record['options'], record['data'])
        for record in records
    }
    if len(settings) > 1 or len(set(seeds)) < len(seeds):
        raise EntryError('the runs differ in more than the seed, or have the same')
    heads = count_heads(first)
    metrics = {
        METRICS[key]: _metric({r['seed']: r['metrics'][key] for r in records})
        for key in first['metrics']
        if key in METRICS
    }
    if not metrics:
        raise EntryError(
            f'no known metric among {", ".join(first["metrics"])}; known are '
            f'{", ".join(METRICS)} (man_mm/leaderboard/entries.py)'
        )
    return dict(
        config=first['config'],
        options=first['options'],
        modules=dict(K=heads + 1, cuts=first.get('cuts', None if heads else [])),
        batch=first.get('batch'),
        resolution=first.get('resolution'),
        device=first.get('device'),
        threads=first['threads'],
        length=first['length'],
        memory=dict(
            peak=first['peak_bytes'],
            split=first.get('kinds'),
            allocated=None,
            reserved=None,
        ),
        # Other trainings may have run beside: `benchmark` measures times.
        step_seconds=None,
        metrics=metrics,
        **_provenance(first),
        command=_command_of_runs(first['command'], seeds),
    )


def count_heads(run: dict) -> int:
    """How many auxiliary heads a run of `compare` trained."""
    return sum(bool(re.fullmatch(r'module\d+/loss', key)) for key in run['curves'])


def _command_of_runs(command: str, seeds: Sequence[int]) -> str:
    parts = shlex.split(command)
    place = parts.index('--seeds') + 1
    return shlex.join([*parts[:place], *map(str, seeds), *parts[place + 1 :]])


def _metric(values: dict[int, float]) -> dict:
    """Mean and sample standard deviation of a metric, by seed."""
    numbers = list(values.values())
    return dict(
        mean=statistics.mean(numbers),
        std=statistics.stdev(numbers) if len(numbers) > 1 else None,
        seeds=list(values),
    )


def compare_with_baseline(entry: dict, baseline: dict | None) -> dict:
    """What an entry needs and reaches, compared with its baseline.

    Args:
        entry: An entry.
        baseline: The entry that it names, None if it names none.

    Returns:
        Ratios ``memory``, ``time`` and ``flops``, and ``gains``, differences of metrics
        of which more than zero is better; only what is known of both.
    """
    relative = entry.get('relative') or {}
    found = {key: relative[key] for key in ('memory', 'time') if key in relative}
    gains = {key: relative[key] for key in relative if key not in ('memory', 'time')}
    if baseline is None:
        if entry['method'] != 'end-to-end':
            return found | dict(gains=gains)
        known = [key for key, number in _COSTS.items() if number(entry)]
        known = known if entry['kind'] == 'measured' else ['memory', 'time']
        return dict.fromkeys(known, 1.0) | dict(
            gains=dict.fromkeys(entry['metrics'], 0.0)
        )
    for key, number in _COSTS.items():
        if number(entry) and number(baseline):
            found[key] = number(entry) / number(baseline)
    for key in filter(baseline['metrics'].get, entry['metrics']):
        difference = entry['metrics'][key]['mean'] - baseline['metrics'][key]['mean']
        gains[key] = -difference if key in LOWER_IS_BETTER else difference
    return found | dict(gains=gains)


def of_method(entries: Iterable[dict], folder: str) -> list[dict]:
    """Entries with accuracy and a baseline, of configs in a folder of ``configs``."""
    prefix = f'configs/{folder}/'
    return [
        entry
        for entry in entries
        if entry['metrics']
        and entry.get('baseline')
        and (entry.get('config') or '').startswith(prefix)
    ]
