"""A pipeline of processes: what is measured of it, and what is predicted."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.multiprocessing as mp
from rich.table import Table

from man_mm.engine.config_files import load_config
from man_mm.parallel.prediction import Link, group_modules, predict_step

from .pipeline_ranks import PipelineSettings, measure_rank
from .records import MIB, cpu_name, versions
from .schemes import parse_scheme, scheme_config


@dataclass(frozen=True)
class GivenDevices:
    """Devices of which there is a prediction only.

    Attributes:
        counts: How many, in each prediction.
        speed: How many times faster than this processor.
        bandwidth: Of the links between them, in GB a second.
        latency: Of the links, in microseconds.
    """

    counts: tuple[int, ...] = (4, 8)
    speed: float = 100
    bandwidth: float = 10
    latency: float = 20


def measure_pipeline(settings: PipelineSettings, given: GivenDevices) -> dict:
    """Measures a pipeline beside one process, and predicts larger ones.

    Args:
        settings: What is measured.
        given: Devices of which there is a prediction only.

    Returns:
        The record.

    Raises:
        ValueError: If it cannot work, before anything is measured.
    """
    check(settings, given)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_rank, (settings, folder), nprocs=settings.processes)
        measured = json.loads(Path(folder, 'result.json').read_text())
    return make_record(measured, settings, given)


def check(settings: PipelineSettings, given: GivenDevices) -> None:
    """Tells what cannot work before anything is measured.

    Raises:
        ValueError: If it cannot.
    """
    if settings.processes < 2:
        raise ValueError('--processes must be at least 2.')
    most = max(settings.processes, *given.counts)
    if settings.modules < most:
        raise ValueError(f'--modules must be at least {most}, a module for each.')
    if min(settings.steps, settings.repeats, settings.in_flight) < 1:
        raise ValueError('--steps, --repeats and --in-flight must be at least 1.')
    if min(given.speed, given.bandwidth) <= 0 or given.latency < 0:
        raise ValueError('--speed and --bandwidth must be more than 0.')
    scheme = parse_scheme(f'local+K={settings.modules}')
    cfg = load_config(settings.config, settings.options)
    scheme_config(cfg, scheme, (settings.batch, 3, *settings.size))


def make_record(
    measured: dict, settings: PipelineSettings, given: GivenDevices
) -> dict:
    """What is stored: measurements, their medians, and predictions.

    Args:
        measured: What the processes measured.
        settings: What was measured.
        given: Devices of which there is a prediction only.
    """
    rounds = measured['rounds']
    seconds = {
        clock: {
            key: statistics.median(row[clock][key] for row in rounds)
            for key in rounds[0][clock]
        }
        for clock in ('wall', 'cpu')
    }
    speedups = {
        clock: _spread(row[clock]['alone'] / row[clock]['pipeline'] for row in rounds)
        for clock in ('wall', 'cpu')
    }
    slowdowns = _spread(row['cpu']['copies'] / row['cpu']['alone'] for row in rounds)
    slowdown = max(slowdowns[1], 1.0)
    columns = zip(*(row['modules'] for row in rounds), strict=True)
    modules = [statistics.median(column) for column in columns]
    sent, link = measured['packet_bytes'], Link(**measured['link'])
    predicted = predict_step(modules, measured['sizes'], sent, link, slowdown)
    given_link = Link(given.latency / 1e6, given.bandwidth * 1e9)
    faster = [second / given.speed for second in modules]
    command = [
        *('mim', 'run', 'man_mm', 'benchmark_pipeline'),
        settings.config,
        '--size',
        *settings.size,
    ]
    for key in ('batch', 'modules', 'processes', 'steps', 'repeats', 'in_flight'):
        command += [f'--{key.replace("_", "-")}', getattr(settings, key)]
    command += ['--devices', *given.counts, '--speed', given.speed]
    command += ['--bandwidth', given.bandwidth, '--latency', given.latency]
    if settings.options:
        command += ['--cfg-options', *settings.options]
    return dict(
        config=settings.config,
        size=list(settings.size),
        batch=settings.batch,
        processes=settings.processes,
        steps=settings.steps,
        in_flight=settings.in_flight,
        **measured,
        seconds=seconds,
        module_seconds=modules,
        speedups=speedups,
        threads_speedups=_spread(
            row['wall']['alone'] / row['wall']['threads'] for row in rounds
        ),
        slowdowns=slowdowns,
        predicted_seconds=predicted,
        predicted_speedup=sum(modules) / predicted,
        predictions=[
            *(_prediction(modules, sent, n, link, 'measured') for n in given.counts),
            *(_prediction(faster, sent, n, given_link, 'given') for n in given.counts),
        ],
        given=dict(
            speed=given.speed,
            bandwidth=given_link.bandwidth,
            latency=given_link.latency,
        ),
        hardware=dict(cpu=cpu_name(), cpus=os.cpu_count(), load=os.getloadavg()[0]),
        versions=versions(),
        command=shlex.join(map(str, command)),
    )


def _spread(values: Iterable[float]) -> list[float]:
    """Smallest, median and largest."""
    values = sorted(values)
    return [values[0], statistics.median(values), values[-1]]


def _prediction(
    modules: list[float], sent: list[int], devices: int, link: Link, parameters: str
) -> dict:
    sizes = group_modules(modules, devices)
    seconds = predict_step(modules, sizes, sent, link)
    return dict(
        parameters=parameters,
        devices=devices,
        sizes=sizes,
        seconds=seconds,
        speedup=sum(modules) / seconds,
    )


def read_records(source: Path) -> list[dict]:
    """Reads all results of a folder."""
    return [json.loads(path.read_text()) for path in sorted(source.glob('*.json'))]


def measured_rows(records: Iterable[dict]) -> list[str]:
    """Rows of what was measured, for documents."""
    return [
        f'| {_images(row)} | {row["processes"]} | {_range(row["speedups"]["cpu"])} '
        f'| {row["predicted_speedup"]:.2f} | {_range(row["slowdowns"])} '
        f'| {_range(row["speedups"]["wall"])} | {_range(row["threads_speedups"])} '
        f'| {sum(row["sent_bytes"]) / MIB:.1f} MiB |'
        for row in records
    ]


def predicted_rows(records: Iterable[dict]) -> list[str]:
    """Rows of what is predicted only, for documents."""
    return [
        f'| {_images(row)} | {prediction["devices"]} | {prediction["parameters"]} '
        f'| {prediction["speedup"]:.2f} |'
        for row in records
        for prediction in row['predictions']
    ]


def _images(row: dict) -> str:
    height, width = row['size']
    return f'{Path(row["config"]).stem}, {row["batch"]} of {height}×{width}'


def _range(spread: list[float]) -> str:
    low, median, high = spread
    return f'{median:.2f} ({low:.2f} to {high:.2f})'


def make_tables(record: dict) -> list[Table]:
    """What was measured beside its prediction, and predictions for more devices."""
    wall, cpu = record['seconds']['wall'], record['seconds']['cpu']
    speedups = record['speedups']
    columns = ('a batch', 'speed-up', 'processor time', 'speed-up')
    measured = Table('', *columns, title='measured: median (smallest to largest)')
    measured.add_row(
        'one process', f'{wall["alone"]:.3f} s', '1', f'{cpu["alone"]:.3f} s', '1'
    )
    measured.add_row(
        'one process, all processors',
        f'{wall["threads"]:.3f} s',
        _range(record['threads_speedups']),
    )
    measured.add_row(
        f'pipeline of {record["processes"]}, modules {record["sizes"]}',
        f'{wall["pipeline"]:.3f} s',
        _range(speedups['wall']),
        f'{cpu["pipeline"]:.3f} s',
        _range(speedups['cpu']),
    )
    measured.add_row(
        f'predicted, slowdown {_range(record["slowdowns"])}',
        '',
        '',
        f'{record["predicted_seconds"]:.3f} s',
        f'{record["predicted_speedup"]:.2f}',
    )
    title = 'PREDICTED, not measured; each device has processors of its own'
    predicted = Table('devices', 'parameters', 'modules', 'speed-up', title=title)
    for row in record['predictions']:
        cells = (row['devices'], row['parameters'], row['sizes'])
        predicted.add_row(*map(str, cells), f'{row["speedup"]:.2f}')
    return [measured, predicted]


def write_record(record: dict, out: Path) -> Path:
    """Writes the JSON file of a record, and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    height, width = record['size']
    stem = f'{Path(record["config"]).stem}_{height}x{width}_b{record["batch"]}'
    path = out / f'{stem}_p{record["processes"]}.json'
    path.write_text(json.dumps(record, indent=2) + '\n')
    return path
