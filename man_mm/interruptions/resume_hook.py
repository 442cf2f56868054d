"""ResumeHook: a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine import registry as root
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from .checkpoints import FORMAT, KEY, choose_checkpoint


@root.HOOKS.register_module()
class ResumeHook(Hook):
    """Makes a resumed run repeat an uninterrupted one.

    - Random numbers follow from the seed, the process and the iteration: the generators
      of Python, numpy and torch are seeded anew for each iteration and each validation,
      so that no state needs to be saved.
    - An epoch goes on where a checkpoint was saved in it; a validation that was cut
      off is repeated.
    - A checkpoint is checked before it is loaded. Automatic resuming skips damaged ones
      and says so; a damaged one that was named is an error.
    - Workers of a data loader that outlive an epoch (``persistent_workers=True``) are
      started anew in each epoch of an epoch-based loop, with other random numbers in
      each, because nothing can seed them while they run.

    Not repeated exactly, and told in the log: another number of processes, and a
    checkpoint between two updates of accumulated gradients.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(resume=dict(type='ResumeHook'))
        >>> type(HOOKS.build(default_hooks['resume'])).__name__
        'ResumeHook'
    """

    priority = 'LOWEST'  # what other hooks do belongs to the iteration that ends

    def __init__(self) -> None:
        self._seed: int | None = None
        self._resumed: dict[str, Any] | None = None

    def before_run(self, runner: Runner) -> None:
        """Finds what to resume from, when about to train."""
        if isinstance(runner.optim_wrapper, OptimWrapper):
            self._seed = runner.seed
            choose_checkpoint(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds what resuming needs to know, unless it is for publishing only."""
        if 'optimizer' not in checkpoint:
            return
        _warn_of_gradients(runner)
        meta = checkpoint['meta']
        checkpoint[KEY] = dict(
            format=FORMAT,
            processes=dist.get_world_size(),
            # Before a validation, what is saved is ahead of the loop's own count.
            validated=(meta['epoch'], meta['iter']) == (runner.epoch, runner.iter),
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Notes where a checkpoint stands that is resumed."""
        if not runner._resume:
            return
        saved = checkpoint.get(KEY, {})
        if saved.get('processes') == dist.get_world_size():
            self._resumed = saved
        else:
            runner.logger.warning(
                'The checkpoint is not one of ResumeHook with '
                f'{dist.get_world_size()} processes: the resumed run will be a proper '
                'one, but not repeat an uninterrupted one exactly.'
            )

    def before_train(self, runner: Runner) -> None:
        """Rebuilds the data loader if the seed has changed; validates if that is due.

        mmengine takes the seed from the checkpoint after the loader was built.
        """
        config, loop = runner._train_dataloader, runner.train_loop
        if runner.seed != self._seed and isinstance(config, dict):
            ranks_differ = runner._randomness_cfg.get('diff_rank_seed', False)
            loop.dataloader = runner.build_dataloader(config, runner.seed, ranks_differ)
            if _is_iteration_based(loop):
                kind = type(loop.dataloader_iterator)
                loop.dataloader_iterator = kind(loop.dataloader)
        loader = loop.dataloader
        if loader.persistent_workers and not _is_iteration_based(loop):
            loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        cut_off = self._resumed and not self._resumed['validated']
        if cut_off and _is_validation_due(runner):
            runner.logger.info('The validation was cut off and is repeated.')
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the loader, and takes an epoch to where it was saved."""
        loop, loader = runner.train_loop, runner.train_loop.dataloader
        if _is_iteration_based(loop):
            # The loop itself passes over batches, so each has to be seeded.
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner)
            return
        first = loop.epoch * len(loader)
        seed(runner, first)
        _restart_workers(loader)
        done = loop.iter - first
        if self._resumed and 0 < done <= len(loader):
            runner.logger.info(f'{done} batches were trained on and are skipped.')
            _pass_over(runner, first, done)
        self._resumed = None

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Seeds the next iteration, which begins with loading its batch."""
        seed(runner, runner.iter + 1)

    def before_val(self, runner: Runner) -> None:
        """Seeds the validation."""
        seed(runner, runner.iter)


def seed(runner: Runner, iteration: int) -> None:
    """Seeds this process for an iteration.

    Args:
        runner: The runner, which knows the seed of the run.
        iteration: The iteration, counted from 0.
    """
    key = runner.seed, dist.get_rank(), iteration
    _seed_all(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _seed_all(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    # torch.manual_seed asks every kind of device, which takes a millisecond.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def _restart_workers(loader: DataLoader) -> None:
    if loader.persistent_workers:
        loader._iterator = None  # as mmdet's YOLOXModeSwitchHook does


def _start_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Keeps torch's seed, which the process draws for an epoch, over mmengine's."""
    value = torch.initial_seed() % 2**32
    if init is not None:
        init(worker_id)
    _seed_all(value)


def _pass_over(runner: Runner, first: int, batches: int) -> None:
    """Lets an epoch-based loop load its first batches without training on them."""
    loop = runner.train_loop
    run_iter = loop.run_iter

    def pass_over(idx: int, data_batch: Any) -> None:
        if idx == batches - 1:
            loop.run_iter = run_iter
        seed(runner, first + idx + 1)

    loop.run_iter = pass_over


class _SeededBatches:
    """Loads each batch with the seed of its iteration."""

    def __init__(self, batches: Iterator, runner: Runner) -> None:
        self._batches, self._runner = batches, runner
        self._iterations = count()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        seed(self._runner, next(self._iterations))
        return next(self._batches)

    def skip_iter(self, iterations: int) -> None:
        """Passes over batches, where a loop of onedl-mmengine resumes.

        They are loaded, although its sampler could pass over them without: workers have
        random states, which go on from one batch to the next.
        """
        for _ in range(iterations):
            next(self)


def _is_iteration_based(loop: Any) -> bool:
    return hasattr(loop, 'dataloader_iterator')


def _is_validation_due(runner: Runner) -> bool:
    # The condition of mmengine's training loops, at the end of an epoch or iteration.
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    if _is_iteration_based(loop):
        done, last = loop.iter, loop.max_iters
    else:
        done, last = loop.epoch, loop.max_epochs
        if loop.iter != done * len(loop.dataloader):
            return False
    on_time = done % loop.val_interval == 0 or done == last
    return done >= max(loop.val_begin, 1) and on_time


def _warn_of_gradients(runner: Runner) -> None:
    wrapper = runner.optim_wrapper
    params = (p for group in wrapper.param_groups for p in group['params'])
    if any(param.grad is not None for param in params):
        runner.logger.warning(
            'This checkpoint is saved between two updates, and without the gradients '
            'accumulated so far: a run resumed from it will not repeat this one '
            'exactly. Set default_hooks.checkpoint.interval to a multiple of '
            f'optim_wrapper.accumulative_counts={wrapper._accumulative_counts}.'
        )
