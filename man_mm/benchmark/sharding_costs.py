"""What each process holds: ``torchrun ... tools/analysis_tools/measure_sharding.py``.

Trains a config's model for two steps in copies (``MMDistributedDataParallel``) and in
parts (``ShardedModel``), on the CPU, and measures what a process holds between steps,
and how much more at the peak of a step. With small images the peak is that of weights
and gradients; with large ones, that of activations. Prints rows of a table, and writes
one JSON file.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from torch import nn

from man_mm import ShardedModel
from man_mm.core.storages import tensor_bytes
from man_mm.measure.memory import measure_memory
from man_mm.measure.synthetic_batch import synthetic_batch

from .records import MIB, versions
from .scheme_costs import load_config
from .training_steps import build_model, build_wrapper

RESULTS = Path('benchmarks/results/sharding')


def measure(cfg: Config, kind: type[nn.Module], shape: tuple[int, ...]) -> dict:
    """Bytes of weights and of optimizer state, and those that a step adds at its peak.

    The largest of all processes, and the number of modules.

    Args:
        cfg: A config that is trained by local learning.
        kind: The model wrapper.
        shape: Shape ``(N, C, H, W)`` of a process's images.
    """
    model = build_model(cfg.model)
    batch = synthetic_batch(model, shape)
    wrapped = kind(model)
    wrapper = build_wrapper(wrapped, cfg)
    if kind is ShardedModel:
        wrapped.shard(wrapper)
    wrapped.train_step(batch, wrapper)  # the optimizer makes its state
    report = measure_memory(lambda: wrapped.train_step(batch, wrapper), split=False)
    held = [
        param for group in wrapper.optimizer.param_groups for param in group['params']
    ]
    weights = tensor_bytes([held, model, wrapper.learner.heads])
    sizes = torch.tensor([weights, tensor_bytes(wrapper.optimizer), report.peak])
    dist.all_reduce(sizes, 'max')
    weights, optimizer, step = sizes.tolist()
    return dict(
        wrapper=kind.__name__,
        modules=len(wrapper.learner.modules),
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        step_bytes=step,
    )


def make_record(args: argparse.Namespace, rows: list[dict]) -> dict:
    """What one run of this tool found, and the command for it."""
    processes = dist.get_world_size()
    command = [
        'torchrun',
        '--nproc_per_node',
        processes,
        'tools/analysis_tools/measure_sharding.py',
    ]
    command += [args.config, '--batch', args.batch, '--size', *args.size]
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    return dict(
        config=args.config,
        options=list(args.cfg_options),
        batch=args.batch,
        size=list(args.size),
        processes=processes,
        rows=rows,
        versions=versions(),
        command=shlex.join(map(str, command)),
    )


def read_records(folder: Path) -> list[dict]:
    """Reads the files of a folder; few modules and processes first."""
    records = [json.loads(path.read_text()) for path in folder.glob('*.json')]
    return sorted(records, key=lambda r: (r['rows'][0]['modules'], r['processes']))


def markdown_rows(records: Iterable[dict]) -> list[str]:
    """Rows: modules, wrapper, processes; MiB of weights, optimizer, step and sum."""
    lines = []
    for record in records:
        for row in record['rows']:
            sizes = [row[f'{kind}_bytes'] for kind in ('weights', 'optimizer', 'step')]
            cells = [f'{size / MIB:.1f}' for size in (*sizes, sum(sizes))]
            name = f'{row["modules"]} | {row["wrapper"]} | {record["processes"]}'
            lines.append(f'| {name} | {" | ".join(cells)} |')
    return lines


def main() -> None:
    """Measures both, prints rows in Markdown, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='config that is trained by local learning')
    parser.add_argument('--batch', type=int, default=2, help='images a process')
    parser.add_argument('--size', type=int, nargs=2, default=(64, 64))
    parser.add_argument('--cfg-options', nargs='+', default=(), metavar='KEY=VALUE')
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder for the file')
    args = parser.parse_args()
    torch.distributed.init_process_group('gloo')
    cfg = load_config(args.config, args.cfg_options)
    shape = (args.batch, 3, *args.size)
    kinds = (MMDistributedDataParallel, ShardedModel)
    record = make_record(args, [measure(cfg, kind, shape) for kind in kinds])
    if dist.is_main_process():
        print('\n'.join(markdown_rows([record])))
        modules = record['rows'][0]['modules']
        name = f'{Path(args.config).stem}_k{modules}_p{record["processes"]}.json'
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / name).write_text(json.dumps(record, indent=2) + '\n')
        print(f'written to {args.out / name}')
    torch.distributed.destroy_process_group()
