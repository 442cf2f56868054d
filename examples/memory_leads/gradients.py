"""How much of the gradients at the cuts a memory by channel or class could hold.

    PYTHONPATH=examples python -m memory_leads.gradients

The stand-in of docs/memory_bank.md is trained by local steps. In their second half, the
gradients of the modules' losses at their inputs are summed up. Their mean, by channel,
by class and channel, or by class, channel and location, is what a memory could hold;
its energy is given as a share of that of the single images' gradients.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from man_mm.engine.config_files import load_config

from .classifiers import on_input

CONFIG = 'configs/man/resnet32_k16_man_fashion.py'
OPTIONS = ('_fashion14.txt', '_memory_stand_in.txt')
CLASSES = 10


class GradientSums(Hook):
    """Sums gradients by class, and their squares, for each module but the first.

    Attributes:
        sums: Sums ``(classes, C, H, W)`` by the name of the module's first layer.
        energies: Sums of the squares.
        counts: Number of images of each class.
    """

    def before_train(self, runner: Runner) -> None:
        self.latest, self.sums, self.energies = {}, {}, {}
        self.counts = torch.zeros(CLASSES)
        for module in runner.optim_wrapper.learner.modules[1:]:
            self.watch(runner.model, module.parts[0])

    def watch(self, model, name):
        def see(x):
            x.register_hook(lambda grad: self.latest.update({name: grad}))

        on_input(model.get_submodule(name), see)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if 2 * runner.iter < runner.max_iters:
            return
        labels = torch.cat([sample.gt_label for sample in data_batch['data_samples']])
        members = F.one_hot(labels, CLASSES).float()
        self.counts += members.sum(0)
        for name, grad in self.latest.items():
            added = torch.einsum('nk,nchw->kchw', members, grad)
            self.sums[name] = self.sums.get(name, 0) + added
            energy = grad.square().sum().item()
            self.energies[name] = self.energies.get(name, 0) + energy


def shares(sums: Tensor, energy: float, counts: Tensor) -> dict[str, float]:
    """The means' shares of the energy.

    Args:
        sums: Sums of gradients ``(classes, C, H, W)``.
        energy: Sum of their squares.
        counts: Number of images of each class ``(classes,)``.
    """
    pixels = sums[0, 0].numel()
    by_channel = sums.mean((2, 3))
    held = dict(
        channel=pixels * by_channel.sum(0).square().sum() / counts.sum(),
        class_channel=pixels * (by_channel.square().sum(1) / counts).sum(),
        class_location=(sums.square().sum((1, 2, 3)) / counts).sum(),
    )
    return {name: float(f'{value / energy:.3g}') for name, value in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--out', type=Path, default='benchmarks/results/memory_bank/gradients.jsonl'
    )
    args = parser.parse_args()
    folder = Path('benchmarks/comparisons')
    options = [line for name in OPTIONS for line in (folder / name).open()]
    cfg = load_config(CONFIG, [line.strip() for line in options])
    cfg.work_dir = 'work_dirs/memory_gradients'
    runner = Runner.from_cfg(cfg)
    hook = GradientSums()
    runner.register_hook(hook)
    runner.train()
    # What means of as many gradients without a common part would hold.
    chance = float(f'{CLASSES / hook.counts.sum():.3g}')
    rows = [
        dict(module=name, **shares(sums, hook.energies[name], hook.counts))
        for name, sums in hook.sums.items()
    ]
    lines = [json.dumps(row | dict(chance=chance)) for row in rows]
    args.out.write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
