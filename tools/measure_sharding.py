"""What each process holds: ``torchrun --nproc_per_node 2 tools/measure_sharding.py``.

Trains a config's model for two steps in copies (``MMDistributedDataParallel``) and in
parts (``ShardedModel``), on the CPU, and prints what a process holds between steps, and
how much more at the peak of a step. With small images the peak is that of weights and
gradients; with large ones, that of activations.
"""

from __future__ import annotations

import argparse

import torch
from _building import build_model, build_wrapper
from benchmark import load_config
from mmengine import dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from torch import nn

from man_mm import ShardedModel
from man_mm.core.memory import measure_memory, tensor_bytes
from man_mm.engine.batches import synthetic_batch

MIB = 2**20


def measure(cfg: Config, kind: type[nn.Module], shape: tuple[int, ...]) -> list[float]:
    """MiB of weights and of optimizer state, and of what a step adds at its peak.

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
    state = tensor_bytes(wrapper.optimizer)
    return [value / MIB for value in (weights, state, report.peak)]


def main() -> None:
    """Prints rows of a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='config that is trained by local learning')
    parser.add_argument('--batch', type=int, default=2, help='images a process')
    parser.add_argument('--size', type=int, nargs=2, default=(64, 64))
    parser.add_argument('--options', nargs='+', default=(), help='KEY=VALUE')
    args = parser.parse_args()
    torch.distributed.init_process_group('gloo')
    cfg = load_config(args.config, args.options)
    for kind in (MMDistributedDataParallel, ShardedModel):
        values = torch.tensor(measure(cfg, kind, (args.batch, 3, *args.size)))
        dist.all_reduce(values, 'max')
        if dist.is_main_process():
            cells = ' | '.join(f'{value:.1f}' for value in values.tolist())
            print(f'| {kind.__name__} | {dist.get_world_size()} | {cells} |')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
