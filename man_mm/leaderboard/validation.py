"""What is asked of entries of the leaderboard, and why one is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator

from .entries import RESULTS, EntryError, derive, read_raw

SCHEMA = Path('benchmarks/entry.schema.json')
# What an entry and its baseline must have in common; the last ones decide times only.
SETTINGS = ('kind', 'task', 'model', 'dataset', 'batch', 'resolution', 'precision')
SETTINGS += ('device', 'length')
SETTINGS_OF_TIMES = ('threads', 'hardware')


def find_errors(entries: dict[Path, dict], root: Path) -> list[str]:
    """Says what is wrong with entries.

    Args:
        entries: All entries by their path, as `_entries.read_entries` returns them.
        root: The repository.

    Returns:
        One line for each error, which starts with the path of the entry.
    """
    schema = json.loads((root / SCHEMA).read_text('utf-8'))
    validator = Draft202012Validator(
        schema, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    lines = []
    by_id = {path.stem: entry for path, entry in entries.items()}
    for path, entry in entries.items():
        found = list(_schema_errors(entry, validator))
        if not found:  # the rest needs the fields to be there
            found = [
                *_name_errors(path, entry),
                *_number_errors(entry),
                *_baseline_errors(entry, by_id),
                *_source_errors(entry, root),
            ]
        lines += [f'{path.relative_to(root)}: {error}' for error in found]
    return lines


def _schema_errors(entry: dict, validator: Draft202012Validator) -> Iterator[str]:
    for error in validator.iter_errors(entry):
        place = '.'.join(map(str, error.absolute_path))
        yield f'{place}: {error.message}' if place else error.message


def _name_errors(path: Path, entry: dict) -> Iterator[str]:
    if entry['id'] != path.stem:
        yield f'id: {entry["id"]!r} is not the name of the file'
    if entry['task'] != path.parent.name:
        yield f'task: {entry["task"]!r} is not the name of the folder'
    command = entry.get('command') or ''
    absolute = [
        word
        for word in command.replace('=', ' ').split()
        if word.startswith(('/', '~'))
    ]
    if absolute:
        yield f'command: {absolute[0]} exists on one machine only'


def _number_errors(entry: dict) -> Iterator[str]:
    memory, modules = entry.get('memory') or {}, entry.get('modules') or {}
    seconds = entry.get('step_seconds')
    if memory.get('split') and sum(memory['split'].values()) != memory['peak']:
        yield 'memory: the parts of the split do not add up to the peak'
    if (memory.get('allocated') or 0) > (memory.get('reserved') or math.inf):
        yield 'memory: more is allocated than reserved'
    if memory.get('allocated') and entry.get('device') != 'cuda':
        yield 'memory: only CUDA has an allocator whose bytes count'
    if seconds and not seconds['least'] <= seconds['median'] <= seconds['greatest']:
        yield 'step_seconds: the median is not between least and greatest'
    if modules.get('cuts') is not None and len(modules['cuts']) != modules['K'] - 1:
        yield f'modules: {len(modules["cuts"])} cuts do not make K={modules["K"]}'
    if entry['method'] == 'end-to-end' and modules.get('K', 1) != 1:
        yield 'modules: end-to-end training has K=1'
    for name, metric in entry['metrics'].items():
        seeds = metric.get('seeds')
        if seeds and len(set(seeds)) < len(seeds):
            yield f'metrics.{name}: a seed counts twice'
        if seeds and (metric.get('std') is None) != (len(seeds) == 1):
            yield f'metrics.{name}: {len(seeds)} seeds and std {metric.get("std")}'
    if not (memory or entry['metrics'] or entry.get('relative')):
        yield 'neither memory nor a metric is given'


def _baseline_errors(entry: dict, by_id: dict[str, dict]) -> Iterator[str]:
    name = entry.get('baseline')
    if name is None:
        if entry['kind'] == 'measured' and entry['method'] != 'end-to-end':
            yield 'baseline: missing; measure end-to-end training in the same settings'
        return
    baseline = by_id.get(name)
    if baseline is None:
        yield f'baseline: there is no entry {name!r}'
        return
    if baseline.get('baseline') is not None or baseline.get('method') != 'end-to-end':
        yield f'baseline: {name!r} is not end-to-end training'
    of_times = SETTINGS_OF_TIMES if entry.get('step_seconds') else ()
    for key in (*SETTINGS, *of_times):
        if entry.get(key) != baseline.get(key):
            yield (
                f'baseline: {name!r} has other settings, {key} '
                f'{baseline.get(key)!r} instead of {entry.get(key)!r}'
            )


def _source_errors(entry: dict, root: Path) -> Iterator[str]:
    if entry['kind'] == 'reported':
        return
    try:
        records = [read_raw(root / RESULTS / source) for source in entry['sources']]
        derived = derive(records)
    except EntryError as error:
        yield f'sources: {error}'
        return
    for key, value in derived.items():
        if key == 'step_seconds' and entry[key] is None:
            continue  # measured while other work ran, so not used
        yield from _differences(key, entry.get(key), value)


def _differences(place: str, stated: object, found: object) -> Iterator[str]:
    """Where an entry differs from its sources; None in the sources means unknown."""
    if found is None and place != 'step_seconds':
        return
    if isinstance(found, dict) and isinstance(stated, dict):
        for key in dict.fromkeys([*stated, *found]):
            if key not in found:
                yield f'{place}.{key}: is not in the sources'
            else:
                yield from _differences(f'{place}.{key}', stated.get(key), found[key])
    elif isinstance(found, float) and isinstance(stated, (float, int)):
        if not math.isclose(found, stated, rel_tol=1e-9):
            yield f'{place}: {stated!r}, but the sources say {found!r}'
    elif stated != found:
        yield f'{place}: {stated!r}, but the sources say {found!r}'
