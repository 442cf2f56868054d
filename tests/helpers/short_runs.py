"""Short real runs, of a second or so, that interruption tests stop and resume."""

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from conftest import LOCAL_LEARNING, build_cifar_classifier, labelled_images
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from man_mm.interruptions.safe_loading import allow_safe_loading

KEYS = ('state_dict', 'ema_state_dict', 'optimizer', 'man_mm', 'param_schedulers')


@METRICS.register_module(force=True)
class Noise(BaseMetric):
    """A metric that draws random numbers, and is better in every second validation."""

    count = 0

    def process(self, data_batch, data_samples):
        self.results.append(float(torch.rand(())))

    def compute_metrics(self, results):
        return dict(noise=results[0])


class Jittered(Dataset):
    """Images, augmented with all three random generators."""

    def __init__(self, batch_of, size):
        torch.manual_seed(0)
        images = batch_of(size, side=8)
        self.images = list(zip(images['inputs'], images['data_samples'], strict=True))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, idx):
        image, sample = self.images[idx]
        shift = random.random() + np.random.rand() + torch.rand(())
        # mmpretrain changes a sample that it sends to another process.
        return dict(inputs=(image + 50 * shift).byte(), data_samples=sample.clone())


def build_runner(
    work_dir, epochs=None, iters=None, workers=0, batch_of=labelled_images, **overrides
):
    """A runner with EMA, schedulers, validation and a best checkpoint."""
    loader = dict(
        batch_size=2,
        num_workers=workers,
        persistent_workers=workers > 0,
        sampler=dict(
            type='DefaultSampler' if epochs else 'InfiniteSampler', shuffle=True
        ),
        dataset=Jittered(batch_of, 6),
        collate_fn=dict(type='pseudo_collate'),
    )
    if epochs:
        train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
    else:
        train_cfg = dict(by_epoch=False, max_iters=iters, val_interval=2)
    checkpoint = dict(
        type='SafeCheckpointHook', interval=1, by_epoch=False, save_best='noise',
        rule='less', max_keep_ckpts=3,
    )  # fmt: skip
    wrapper = dict(LOCAL_LEARNING, optimizer=dict(type='SGD', lr=1e-3, momentum=0.9))
    settings = dict(
        model=build_cifar_classifier(8),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=train_cfg,
        val_dataloader=dict(
            batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=Jittered(batch_of, 2), collate_fn=dict(type='pseudo_collate'),
        ),
        val_cfg=dict(),
        val_evaluator=dict(type='Noise'),
        optim_wrapper=wrapper,
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, end=3, by_epoch=False),
            dict(type='CosineAnnealingLR', T_max=20, by_epoch=False),
            dict(type='ReduceOnPlateauLR', monitor='noise', patience=0, factor=0.5),
        ],
        default_hooks=dict(
            checkpoint=checkpoint, memory_bank=dict(type='MemoryBankHook'),
            resume=dict(type='ResumeHook'),
        ),
        custom_hooks=[dict(type='EMAHook')],
        default_scope='mmpretrain',
        randomness=dict(seed=0),
        resume=True,
        experiment_name=f'{work_dir}-{random.random()}',
        log_level='ERROR',
    )  # fmt: skip
    for key, value in overrides.items():
        if key == 'checkpoint':
            checkpoint.update(value)
        elif key == 'loader':
            loader.update(value)
        else:
            settings[key] = value
    return Runner(**settings)


class StopHook(Hook):
    """Ends a run as an interruption would: nothing more is done or saved."""

    priority = 'LOWEST'

    def __init__(self, iters):
        self.iters = iters

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iters:
            raise KeyboardInterrupt


def finish(runner, stop=None):
    """Trains to the end, or to where it is stopped; returns the last checkpoint."""
    if stop is not None:
        runner.register_hook(StopHook(stop))
    with suppress(KeyboardInterrupt):
        runner.train()
    return last_checkpoint(runner.work_dir)


def train(work_dir, stop=None, **kwargs):
    """The same with `build_runner`."""
    return finish(build_runner(work_dir, **kwargs), stop)


def warnings_of(runner, kind='warning'):
    """The list that the runner's warnings, or errors, go to from now on."""
    told = []
    setattr(runner.logger, kind, told.append)
    return told


def last_checkpoint(work_dir):
    pointer = Path(work_dir, 'last_checkpoint')
    allow_safe_loading()
    return torch.load(pointer.read_text(), weights_only=True)


def different(a, b, path=''):
    """Names of the entries in which two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f'{path}: {a.keys() ^ b.keys()}']
        return [d for k in a for d in different(a[k], b[k], f'{path}.{k}')]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in different(x, y, f'{path}.{i}')
        ]
    return [] if a == b else [path]


def differences(a, b):
    """The same for what a run ends with."""
    return [d for key in KEYS for d in different(a.get(key), b.get(key), key)]
