"""ResumeHook: a resumed run repeats an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine import dist
from mmengine import registry as root
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from .checkpoint_hook import make_saving_safe
from .checkpoints import FORMAT, KEY, choose_checkpoint
from .plain_data import from_plain_data, to_plain_data
from .random_state import get_random_state, restart_workers, set_random_state


@root.HOOKS.register_module()
class ResumeHook(Hook):
    """Makes a resumed run repeat an uninterrupted one, and saving safe.

    - The random state of every rank is saved with each checkpoint and restored on
      resuming, and so is the place in an epoch. Validation runs on a state of its
      own, so that training does not depend on when it is validated.
    - Objects that mmengine pickles are saved as plain data, so that stock tools read
      the checkpoint with the safe loading of torch 2.6 and later.
    - The runner's ``CheckpointHook`` becomes a `SafeCheckpointHook`.
    - A checkpoint is checked before it is resumed. Automatic resuming skips damaged
      ones and says so; a damaged one that was named is an error.

    Workers of a data loader that outlive an epoch are started anew in each epoch,
    because their random state cannot be saved. Not repeated exactly, and told in the
    log: another number of processes, and a checkpoint between two updates of
    accumulated gradients. Samplers that shuffle by the global random state, as torch's
    ``RandomSampler``, repeat in epoch-based loops only.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(resume=dict(type='ResumeHook'))
        >>> type(HOOKS.build(default_hooks['resume'])).__name__
        'ResumeHook'
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._seed: int | None = None
        self._resumed: dict[str, Any] | None = None
        self._gathered: list[dict[str, Any]] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None
        self._batches = 0  # that this epoch has trained on

    def before_run(self, runner: Runner) -> None:
        """Makes saving safe, and finds what to resume from, when about to train."""
        if isinstance(runner.optim_wrapper, OptimWrapper):
            self._seed = runner.seed
            make_saving_safe(runner)
            choose_checkpoint(runner)

    def gather_state(self, runner: Runner) -> None:
        """Collects what the next checkpoint stores; called on all ranks."""
        self._gathered = dist.all_gather_object(self._state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the state, unless the checkpoint is for publishing only."""
        to_plain_data(checkpoint)
        # Nothing was gathered if another hook saves, on rank 0 alone.
        ranks, self._gathered = self._gathered or [self._state()], None
        if 'optimizer' in checkpoint:
            _warn_of_gradients(runner)
            checkpoint[KEY] = dict(
                format=FORMAT,
                ranks=ranks,
                batches=self._batches,
                validated=self._before_val is not None,
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes the state out of a checkpoint that is resumed."""
        from_plain_data(checkpoint)
        if not runner._resume:
            return
        saved = checkpoint.get(KEY)
        if saved is None or len(saved['ranks']) != dist.get_world_size():
            runner.logger.warning(
                'The checkpoint has no random state for each of the '
                f'{dist.get_world_size()} processes: the resumed run will be a proper '
                'one, but not repeat an uninterrupted one exactly.'
            )
            return
        self._resumed = dict(saved, **saved['ranks'][dist.get_rank()])

    def before_train(self, runner: Runner) -> None:
        """Rebuilds the data loader if the seed has changed.

        mmengine takes the seed from the checkpoint after the loader was built.
        """
        config, loop = runner._train_dataloader, runner.train_loop
        if runner.seed == self._seed or not isinstance(config, dict):
            return
        ranks_differ = runner._randomness_cfg.get('diff_rank_seed', False)
        loop.dataloader = runner.build_dataloader(config, runner.seed, ranks_differ)
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    def finish_validation(self, runner: Runner) -> None:
        """Validates what was saved, if the interruption came before that was done."""
        resumed = self._resumed
        if resumed and not resumed['validated'] and _is_validation_due(runner, resumed):
            runner.logger.info('The validation was cut off and is repeated.')
            set_random_state(resumed['now'])
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Restores the state once, when the data loader stands at its old place."""
        loop, resumed, self._resumed = runner.train_loop, self._resumed, None
        if hasattr(loop, 'dataloader_iterator'):  # iteration-based
            if resumed:
                loop.dataloader_iterator = _RestoreAfter(
                    loop.dataloader_iterator, runner.iter, resumed['now']
                )
            return
        restart_workers(loop.dataloader, runner.epoch)
        self._batches = 0
        if resumed and resumed['batches']:
            self._batches = min(resumed['batches'], len(loop.dataloader))
            runner.logger.info(
                f'{self._batches} batches of the epoch were trained on and are skipped.'
            )
            set_random_state(resumed['epoch_start'])
            _skip(loop, self._batches, resumed['now'])
        elif resumed:
            set_random_state(resumed['now'])
        self._epoch_start = get_random_state()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Counts the batches of an epoch."""
        self._batches = batch_idx + 1

    def after_train_epoch(self, runner: Runner) -> None:
        """The next checkpoint belongs to the start of an epoch."""
        self._batches = 0

    def before_val(self, runner: Runner) -> None:
        """Keeps the training state."""
        self._before_val = get_random_state()

    def after_val(self, runner: Runner) -> None:
        """Returns to the training state."""
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None

    def _state(self) -> dict[str, Any]:
        # In a validation: the state that training goes on with.
        now = self._before_val or get_random_state()
        return dict(now=now, epoch_start=self._epoch_start)


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


def _is_validation_due(runner: Runner, resumed: dict[str, Any]) -> bool:
    # The condition of mmengine's training loops, at the end of an epoch or iteration.
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    if hasattr(loop, 'dataloader_iterator'):
        done, last = loop.iter, loop.max_iters
    else:
        done, last = loop.epoch, loop.max_epochs
        if resumed['batches']:
            return False
    on_time = done % loop.val_interval == 0 or done == last
    return done >= max(loop.val_begin, 1) and on_time


def _skip(loop: Any, batches: int, state: dict[str, Any]) -> None:
    """Lets an epoch pass over its first batches, and then restores the state."""
    run_iter = loop.run_iter

    def pass_over(idx: int, data_batch: Any) -> None:
        if idx == batches - 1:  # the next batch is loaded after this
            set_random_state(state)
            loop.run_iter = run_iter

    loop.run_iter = pass_over


class _RestoreAfter:
    """Iterates over batches; restores a random state once some were skipped.

    mmengine's iteration-based loop replays the loader up to the resumed iteration,
    which itself draws random numbers.
    """

    def __init__(self, iterator: Iterator, skip: int, state: dict[str, Any]) -> None:
        self._iterator = iterator
        self._left = skip
        self._state = state

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._left == 0:
            set_random_state(self._state)
        self._left -= 1
        return next(self._iterator)
