"""Measure a pipeline of processes: ``mim run man_mm benchmark_pipeline CONFIG``.

Trains a model by local learning in one process, and the same modules in several
processes that each work a batch ahead of the next one (`man_mm.core.ModulePipeline`).
Both ways give the same weights, bit by bit. In every round, one after the other:

- a batch in one process, with one thread, module by module;
- a batch in one process, with a thread on each processor;
- a batch in one process while the other processes train copies of their own: what
  processors that share caches, memory or a core cost each other;
- a batch in the pipeline when it is full, with one thread a process.

Each is taken by two clocks. The wall's is what counts on an idle machine. If others use
the processors, it says little: two processes get a larger share of them than one. Time
on the processor does not count the others; that of a pipeline is its slowest rank's.

The link between processes is measured before. From modules, link and slowdown, a model
predicts the pipeline, which is shown beside what was measured, and pipelines of more
devices, which are predictions only. Batches are random and the same each time; reading
data is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from man_mm.parallel.prediction import Link, group_modules, predict_step

from .pipeline_ranks import measure_rank
from .records import MIB, cpu_name, versions
from .scheme_costs import load_config
from .schemes import SchemeError, parse_scheme, scheme_config


def make_record(measured: dict, args: argparse.Namespace) -> dict:
    """What is stored: measurements, their medians, and predictions.

    Args:
        measured: What the processes measured.
        args: Arguments of the tool.
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
    given = Link(args.latency / 1e6, args.bandwidth * 1e9)
    faster = [second / args.speed for second in modules]
    command = [
        *('mim', 'run', 'man_mm', 'benchmark_pipeline'),
        args.config,
        '--size',
        *args.size,
    ]
    for key in ('batch', 'modules', 'processes', 'steps', 'repeats', 'in_flight'):
        command += [f'--{key.replace("_", "-")}', getattr(args, key)]
    command += ['--devices', *args.devices, '--speed', args.speed]
    command += ['--bandwidth', args.bandwidth, '--latency', args.latency]
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    return dict(
        config=args.config,
        size=list(args.size),
        batch=args.batch,
        processes=args.processes,
        steps=args.steps,
        in_flight=args.in_flight,
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
            *(_prediction(modules, sent, n, link, 'measured') for n in args.devices),
            *(_prediction(faster, sent, n, given, 'given') for n in args.devices),
        ],
        given=dict(speed=args.speed, bandwidth=given.bandwidth, latency=given.latency),
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


def check(args: argparse.Namespace) -> None:
    """Tells what cannot work before anything is measured.

    Raises:
        ValueError: If it cannot.
    """
    if args.processes < 2:
        raise ValueError('--processes must be at least 2.')
    most = max(args.processes, *args.devices)
    if args.modules < most:
        raise ValueError(f'--modules must be at least {most}, a module for each.')
    if min(args.steps, args.repeats, args.in_flight) < 1:
        raise ValueError('--steps, --repeats and --in-flight must be at least 1.')
    if min(args.speed, args.bandwidth) <= 0 or args.latency < 0:
        raise ValueError('--speed and --bandwidth must be more than 0.')
    scheme = parse_scheme(f'local+K={args.modules}')
    cfg = load_config(args.config, args.cfg_options)
    scheme_config(cfg, scheme, (args.batch, 3, *args.size))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(224, 224), help='height and width'
    )
    parser.add_argument('--batch', type=int, default=4, help='images in a step')
    parser.add_argument('--modules', type=int, default=8, help='modules (balanced)')
    parser.add_argument('--processes', type=int, default=2, help='of the pipeline')
    parser.add_argument('--steps', type=int, default=6, help='timed batches a round')
    parser.add_argument('--repeats', type=int, default=5, help='rounds')
    parser.add_argument('--in-flight', type=int, default=2, help='batches ahead')
    parser.add_argument(
        '--devices', type=int, nargs='+', default=[4, 8], help='to predict'
    )
    given = parser.add_argument_group('devices of which there is a prediction only')
    given.add_argument(
        '--speed', type=float, default=100, help='times faster than this processor'
    )
    given.add_argument('--bandwidth', type=float, default=10, help='of links, in GB/s')
    given.add_argument('--latency', type=float, default=20, help='of links, in µs')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='overrides'
    )
    parser.add_argument('--out', type=Path, help='folder for the JSON file')
    args = parser.parse_args()
    for message in ('.*use_reentrant', 'pkg_resources'):
        warnings.filterwarnings('ignore', message=message)
    try:
        check(args)
    except (SchemeError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_rank, (args, folder), nprocs=args.processes)
        measured = json.loads(Path(folder, 'result.json').read_text())
    record = make_record(measured, args)
    for table in make_tables(record):
        Console().print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        height, width = args.size
        name = f'{Path(args.config).stem}_{height}x{width}_b{args.batch}'
        path = args.out / f'{name}_p{args.processes}.json'
        path.write_text(json.dumps(record, indent=2) + '\n')
