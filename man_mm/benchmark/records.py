"""Records of `benchmark`: JSON files and tables."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import mmengine
import torch
from rich.table import Table

from man_mm.version import __version__

MIB = 2**20
BASE = 'end-to-end'


def make_records(
    results: dict[str, dict],
    config: str,
    size: Sequence[int],
    batch: int,
    device: str = 'cpu',
    options: Sequence[str] = (),
) -> list[dict]:
    """What is stored of each scheme.

    Args:
        results: What `measure_schemes` of `man_mm.benchmark.scheme_costs` returned.
        config: Path of the config.
        size: Height and width of the images.
        batch: Images in a step.
        device: Where it was trained.
        options: Overridden settings of the config.
    """
    first = next(iter(results))
    base_name = BASE if BASE in results else first
    base = results[base_name]
    threads, records = torch.get_num_threads(), []
    for position, (name, row) in enumerate(results.items()):
        time_ratio = images_per_second = None
        if row['seconds']:
            seconds = statistics.median(row['seconds'])
            time_ratio = seconds / statistics.median(base['seconds'])
            images_per_second = batch / seconds
        needed = dict.fromkeys([base_name, row['reference'], name])
        command = [
            *('mim', 'run', 'man_mm', 'benchmark'),
            config,
            '--schemes',
            *needed,
        ]
        command += ['--size', *map(str, size), '--batch', str(batch)]
        command += ['--repeats', str(len(row['seconds'])), '--device', device]
        if options:
            command += ['--cfg-options', *options]
        records.append(
            dict(
                config=config,
                options=list(options),
                scheme=name,
                size=list(size),
                batch=batch,
                device=device,
                threads=threads,
                **row,
                base=base_name,
                peak_ratio=row['peak'] / base['peak'],
                flops_ratio=row['flops'] / base['flops'],
                time_ratio=time_ratio,
                images_per_second=images_per_second,
                position=position,
                versions=versions(),
                **provenance(device),
                command=f'OMP_NUM_THREADS={threads} {shlex.join(command)}',
            )
        )
    return records


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return dict(
        man_mm=__version__,
        torch=torch.__version__,
        mmengine=mmengine.__version__,
        python=platform.python_version(),
    )


def provenance(device: str = 'cpu') -> dict[str, str | None]:
    """On what, of which commit and when something is measured.

    Args:
        device: Where it runs.

    Returns:
        ``hardware``; ``commit``, with ``-dirty`` if files differ from it, None outside
        of a repository; ``date`` in UTC.
    """
    git = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        found = None
    return dict(
        hardware=_hardware(device),
        commit=found and found.stdout.strip(),
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def _hardware(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{cpu_name()}, {len(os.sched_getaffinity(0))} cores'


def cpu_name() -> str:
    """What the system calls its processor."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(':')[2] for line in lines if line.startswith('model name')]
    return names[0].strip() if names else platform.machine()


def write_records(records: Iterable[dict], out: Path) -> None:
    """Writes ``<config>_<H>x<W>_b<batch>/<scheme>.json`` for each record."""
    for record in records:
        stem, (height, width) = Path(record['config']).stem, record['size']
        slug = record['scheme'].replace('+', '_').replace('=', '-').replace(',', '-')
        path = out / f'{stem}_{height}x{width}_b{record["batch"]}' / f'{slug}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + '\n')


def read_records(source: Path, configs: Sequence[str] = ()) -> list[dict]:
    """Reads what `write_records` wrote; only these configs, and in this order."""
    records = [json.loads(path.read_text()) for path in source.rglob('*.json')]
    configs = configs or sorted({record['config'] for record in records})
    records = [record for record in records if record['config'] in configs]

    def order(record: dict) -> tuple:
        keys = ('size', 'batch', 'device', 'position', 'scheme')
        values = (record[key] for key in keys)
        numbers = [int(x) for x in re.findall(r'\d+', setting(record))]
        return configs.index(record['config']), numbers, *values

    return sorted(records, key=order)


def setting(record: dict) -> str:
    """What was trained: name of the config, and what was overridden in it.

    Examples:
        >>> from man_mm.benchmark.records import setting
        >>> options = ['model.backbone.depth=34']
        >>> setting(dict(config='configs/man/resnet18.py', options=options))
        'resnet18, depth=34'
    """
    parts = [Path(record['config']).stem]
    for option in record.get('options', ()):  # older records do not tell
        key, _, value = option.partition('=')
        parts.append(f'{key.rpartition(".")[2]}={value}')
    return ', '.join(parts)


def group_records(records: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Groups records that were measured together: setting, size, batch, device."""

    def key(record: dict) -> tuple:
        return (
            setting(record),
            tuple(record['size']),
            record['batch'],
            record['device'],
        )

    return {key_: list(group) for key_, group in groupby(records, key)}


def make_tables(records: Iterable[dict]) -> list[Table]:
    """Two tables for every config and batch: costs, and what the peaks consist of."""
    tables = []
    for (name, size, batch, device), group in group_records(records).items():
        title = f'{name}, {batch} x {size[0]}x{size[1]}, {device}'
        tables += [_cost_table(group, title), _kind_table(group, title)]
    return tables


def markdown_rows(records: Iterable[dict]) -> list[str]:
    """Rows of the costs, as they stand in the documents; see `has_times`."""
    records = list(records)
    rows = []
    for row in records:
        cells = [row['scheme'], f'{row["peak"] / MIB:.1f} MiB']
        cells.append(f'{row["peak_ratio"]:.3f}')
        if has_times(records):
            cells.append(f'{statistics.median(row["seconds"]):.2f} s')
            cells.append(f'{row["time_ratio"]:.3f}')
        cells.append(f'{row["flops_ratio"]:.3f}')
        rows.append(f'| {" | ".join(cells)} |')
    return rows


def has_times(records: Iterable[dict]) -> bool:
    """Whether all steps were timed, as they are unless ``--repeats`` is 0."""
    return all(record['seconds'] for record in records)


def _cost_table(records: Sequence[dict], title: str) -> Table:
    on_cuda = [key for key in ('allocated', 'reserved') if records[0]['cuda']]
    columns = ['peak MiB', 'ratio', *(f'{key} MiB' for key in on_cuda)]
    timed = has_times(records)
    columns += ['step s', 'min–max', 'ratio', 'images/s'] * timed
    columns += ['FLOPs', 'exactness']
    table = _table(title, columns)
    for row in records:
        table.add_row(
            row['scheme'],
            f'{row["peak"] / MIB:.1f}',
            f'{row["peak_ratio"]:.3f}',
            *(f'{row["cuda"][key] / MIB:.1f}' for key in on_cuda),
            *(_time_cells(row) if timed else ()),
            f'{row["flops_ratio"]:.3f}',
            _exactness(row),
        )
    return table


def _time_cells(row: dict) -> list[str]:
    seconds = row['seconds']
    return [
        f'{statistics.median(seconds):.3g}',
        f'{min(seconds):.3g}–{max(seconds):.3g}',
        f'{row["time_ratio"]:.3f}',
        f'{row["images_per_second"]:.3g}',
    ]


def _kind_table(records: Sequence[dict], title: str) -> Table:
    kinds = dict.fromkeys(kind for row in records for kind in row['kinds'])
    kinds = [kind for kind in kinds if any(row['kinds'].get(kind) for row in records)]
    table = _table(f'{title}: MiB at the peak', kinds)
    for row in records:
        sizes = [row['kinds'].get(kind, 0) / MIB for kind in kinds]
        table.add_row(row['scheme'], *(f'{size:.1f}' for size in sizes))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column('scheme', no_wrap=True)
    for column in columns:
        table.add_column(column, justify='right')
    return table


def _exactness(row: dict) -> str:
    error = row['exactness']
    if row['reference'] == row['scheme']:
        return 'reference'
    if error and error < 0.01:
        return f'{error:.0e}'.replace('e-0', 'e-')
    return f'{error:.2f}' if error else '0'
