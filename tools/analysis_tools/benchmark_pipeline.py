"""Measure a pipeline of processes: ``mim run man_mm benchmark_pipeline CONFIG``.

Trains a model by local learning in one process, and the same modules in several
processes that each work a batch ahead of the next one (`ModulePipeline`).
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

import argparse
import sys
import warnings
from pathlib import Path

from rich.console import Console

from man_mm.benchmark.pipeline_costs import (
    GivenDevices,
    make_tables,
    measure_pipeline,
    write_record,
)
from man_mm.benchmark.pipeline_ranks import PipelineSettings


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(224, 224),
        help='height and width of the images in pixels',
    )
    parser.add_argument('--batch', type=int, default=4, help='images in a step')
    parser.add_argument(
        '--modules', type=int, default=8, help='number of modules, of balanced memory'
    )
    parser.add_argument(
        '--processes', type=int, default=2, help='number of processes in the pipeline'
    )
    parser.add_argument(
        '--steps', type=int, default=6, help='timed batches in each round'
    )
    parser.add_argument('--repeats', type=int, default=5, help='number of rounds')
    parser.add_argument(
        '--in-flight',
        type=int,
        default=2,
        help='batches that a rank may be ahead of the next one',
    )
    parser.add_argument(
        '--devices',
        type=int,
        nargs='+',
        default=[4, 8],
        help='numbers of devices to predict the speed-up for',
    )
    given = parser.add_argument_group('devices of which there is a prediction only')
    given.add_argument(
        '--speed',
        type=float,
        default=100,
        help='speed of a predicted device, as a multiple of this processor',
    )
    given.add_argument(
        '--bandwidth',
        type=float,
        default=10,
        help='bandwidth of the predicted links, in GB/s',
    )
    given.add_argument(
        '--latency',
        type=float,
        default=20,
        help='latency of the predicted links, in µs',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument('--out', type=Path, help='folder to write the JSON file to')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for message in ('.*use_reentrant', 'pkg_resources'):
        warnings.filterwarnings('ignore', message=message)
    settings = PipelineSettings(
        args.config,
        tuple(args.size),
        args.batch,
        args.modules,
        args.processes,
        args.steps,
        args.repeats,
        args.in_flight,
        tuple(args.cfg_options),
    )
    given = GivenDevices(tuple(args.devices), args.speed, args.bandwidth, args.latency)
    try:
        record = measure_pipeline(settings, given)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'benchmark_pipeline: {error}')
    for table in make_tables(record):
        Console().print(table)
    if args.out:
        write_record(record, args.out)


if __name__ == '__main__':
    main()
