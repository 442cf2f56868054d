"""Measure memory and time of a training step: ``python tools/benchmark.py CONFIG``.

Compares, on the same model, data, freezing and optimizer, in one process:

- ``end-to-end``: the config without local learning;
- ``checkpointing``: the same with ``with_cp=True`` in the backbone;
- ``local learning``: the config as it is.

Memory is the peak of live tensor bytes above the start of a training step whose
optimizer state exists already; time is the median of interleaved repeats.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from man_mm import __version__
from man_mm.core.memory import measure_memory

SCHEMES = ('end-to-end', 'checkpointing', 'local learning')
MIB = 2**20


def end_to_end(cfg: Config) -> Config:
    """A copy of a config without local learning."""
    cfg = copy.deepcopy(cfg)
    for key in ('local_learning', 'constructor'):
        cfg.optim_wrapper.pop(key, None)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.default_hooks.pop('memory_bank', None)
    return cfg


def scheme_config(cfg: Config, scheme: str) -> Config:
    """A copy of a config that trains by a scheme."""
    if scheme == 'local learning':
        return copy.deepcopy(cfg)
    cfg = end_to_end(cfg)
    if scheme == 'checkpointing':
        cfg.model.backbone.with_cp = True
    return cfg


def build_step(cfg: Config, data: dict) -> Callable[[], object]:
    """A function that trains a config's model for one step on fixed data.

    Args:
        cfg: Config of a model of mmdet; pretrained weights are not loaded.
        data: A batch as the data loader gives it.
    """
    torch.manual_seed(0)
    cfg.model.backbone.init_cfg = None  # weights do not matter here
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if 'memory_bank' in cfg.default_hooks:
        wrapper.learner.bank = HOOKS.build(cfg.default_hooks.memory_bank).bank
    return lambda: model.train_step(data, wrapper)


def measure(
    cfg: Config, height: int, width: int, batch: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Measures all schemes of a config in turn.

    Args:
        cfg: Config trained by local learning.
        height: Image height in pixels, before padding to a multiple of 32.
        width: Image width in pixels.
        batch: Images in a step.
        repeats: Timed steps a scheme.

    Returns:
        By scheme: ``peak`` in bytes and ``seconds``, a list.
    """
    data = demo_mm_inputs(batch, (3, height, width), num_items=[8] * batch)
    steps = {name: build_step(scheme_config(cfg, name), data) for name in SCHEMES}
    results = {}
    for name, step in track(steps.items(), 'memory', transient=True):
        step()  # makes the optimizer's state
        results[name] = dict(peak=measure_memory(step).peak, seconds=[])
    for _ in track(range(repeats), 'time', transient=True):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            results[name]['seconds'].append(time.perf_counter() - start)
    return results


def make_table(results: dict[str, dict], title: str) -> Table:
    """A table of peaks and times, and their ratios to end-to-end training."""
    table = Table(title=title)
    for column in ('scheme', 'peak MiB', 'ratio', 'step s', 'ratio'):
        table.add_column(column, justify='left' if column == 'scheme' else 'right')
    base = results['end-to-end']
    for name, row in results.items():
        seconds = statistics.median(row['seconds'])
        table.add_row(
            name,
            f'{row["peak"] / MIB:.0f}',
            f'{row["peak"] / base["peak"]:.3f}',
            f'{seconds:.2f}',
            f'{seconds / statistics.median(base["seconds"]):.3f}',
        )
    return table


def load_config(path: str) -> Config:
    """Loads a config, its custom imports and its default scope."""
    cfg = Config.fromfile(path)
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=None)))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config trained by local learning')
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1333))
    parser.add_argument('--batch', type=int, default=1, help='images in a step')
    parser.add_argument('--repeats', type=int, default=5, help='timed steps')
    parser.add_argument('--out', type=Path, help='JSON file for the result')
    args = parser.parse_args()

    cfg = load_config(args.config)
    results = measure(cfg, *args.size, args.batch, args.repeats)
    title = f'{Path(args.config).stem}, {args.batch} x {args.size[0]}x{args.size[1]}'
    Console().print(make_table(results, title))
    if args.out:
        record = dict(
            config=args.config,
            size=list(args.size),
            batch=args.batch,
            device='cpu',
            threads=torch.get_num_threads(),
            results=results,
            versions=dict(
                man_mm=__version__,
                torch=torch.__version__,
                python=platform.python_version(),
            ),
            command=(
                f'python tools/benchmark.py {args.config} --size {args.size[0]} '
                f'{args.size[1]} --batch {args.batch} --repeats {args.repeats}'
            ),
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
    main()
