"""SafeCheckpointHook: a failed or interrupted save costs no earlier checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine import registry as root
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from .files import ATOMIC_BACKEND, TEMPORARY, PatientBackend, write_atomically

_STATE = (
    'last_ckpt',
    'keep_ckpt_ids',
    'best_ckpt_path',
    'best_ckpt_path_dict',
    '_resumable',
    '_step',
)


def make_saving_safe(runner: Runner) -> None:
    """Turns the runner's checkpoint hook into a `SafeCheckpointHook`.

    Args:
        runner: A runner that is about to train.
    """
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:
            hook.__class__ = SafeCheckpointHook  # it adds behaviour, and no options
        elif isinstance(hook, CheckpointHook) and not isinstance(
            hook, SafeCheckpointHook
        ):
            MMLogger.get_current_instance().warning(
                f'{type(hook).__name__} saves checkpoints in its own way: an '
                'interruption can damage them. Derive it from SafeCheckpointHook.'
            )


def _best_checkpoints(hook: CheckpointHook) -> set[str]:
    one, several = (
        vars(hook).get(key) for key in ('best_ckpt_path', 'best_ckpt_path_dict')
    )
    return {one, *(several or {}).values()}


@root.HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, safe against interruptions and full disks.

    - Checkpoints and ``last_checkpoint`` are written to a temporary file, read back
      and renamed. Older and previous best ones are removed after that.
    - A save that fails, as on a full disk, is told as an error in the log. Training
      goes on as long as there is an earlier checkpoint to resume from, and the next
      save tries again. If the last save of a run failed, the run ends with an error.
    - What was saved just before a validation is saved again after it, so that a
      resumed run knows its results; a validation that was cut off is repeated.

    `ResumeHook` turns a plain ``CheckpointHook`` into this one. It takes the same
    arguments. On other storage than local files, writing is left to its backend.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', interval=1))
        >>> type(HOOKS.build(default_hooks['checkpoint'])).__name__
        'SafeCheckpointHook'
    """

    _resumable: str | None = None  # the checkpoint to fall back on
    _failure: str | None = None  # of the latest save
    _step: int | None = None  # of the latest save

    def before_train(self, runner: Runner) -> None:
        """Prepares saving, and finishes a validation that was cut off."""
        super().before_train(runner)
        self._resumable = runner._load_from if runner._resume else None
        self._step = self._failure = None
        if type(self.file_backend) is LocalBackend and not self.file_client_args:
            self.backend_args = dict(backend=ATOMIC_BACKEND)
            self.file_backend = PatientBackend()
            if dist.is_main_process():
                pattern = f'{self.filename_tmpl.format("*")}{TEMPORARY}'
                for path in Path(self.out_dir).glob(f'*{pattern}'):
                    path.unlink()
        runner.call_hook('finish_validation')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Saves the best checkpoint, and again what the validation belongs to."""
        step = runner.epoch if self.by_epoch else runner.iter
        again, self._step = self._step == step, None
        super().after_val_epoch(runner, metrics)
        if again and self._step is None:
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta)

    def after_train(self, runner: Runner) -> None:
        """Publishes as configured.

        Raises:
            OSError: If the last save failed.
        """
        super().after_train(runner)
        if self._failure is not None:
            raise OSError(f'The run is over, but its end is not saved. {self._failure}')

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        if not self.save_best:
            return
        with self._all_or_nothing(runner, 'The best checkpoint'):
            super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict[str, Any]
    ) -> None:
        name = self.filename_tmpl.format(step)
        with self._all_or_nothing(runner, name):
            old = self._count(runner, step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if dist.is_main_process():
                pointer = Path(runner.work_dir, 'last_checkpoint')
                write_atomically(pointer, self.last_ckpt.encode(), is_checkpoint=False)
                if old is not None and self.file_backend.isfile(old):
                    self.file_backend.remove(old)
            self._step, self._failure, self._resumable = step, None, self.last_ckpt

    def _count(self, runner: Runner, step: int) -> str | None:
        """Counts a checkpoint that is kept; returns the one that it replaces."""
        if self.max_keep_ckpts <= 0 or step in list(self.keep_ckpt_ids)[-1:]:
            return None
        old = None
        if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            name = self.filename_tmpl.format(self.keep_ckpt_ids[0])
            old = self.file_backend.join_path(self.out_dir, name)
        self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        return old

    @contextmanager
    def _all_or_nothing(self, runner: Runner, name: str) -> Iterator[None]:
        """Undoes a save that fails, on all ranks; then goes on if that loses nothing.

        Raises:
            OSError: If there is no earlier checkpoint.
        """
        own = vars(self)
        before = {key: copy.copy(own[key]) for key in _STATE if key in own}
        info = dict(runner.message_hub.runtime_info)
        runner.call_hook('gather_state')
        reason: list[str | None] = [None]
        try:
            yield
        except OSError as error:
            reason = [error.strerror or str(error)]
        dist.broadcast_object_list(reason)
        patient = isinstance(self.file_backend, PatientBackend)
        if reason[0] is None:
            if patient and dist.is_main_process():
                self.file_backend.remove_now(keep=_best_checkpoints(self))
            return
        own.update(before)
        runner.message_hub.runtime_info.clear()
        runner.message_hub.runtime_info.update(info)
        if patient:
            self.file_backend.spare()
        self._failure = (
            f'{name} could not be saved in {self.out_dir}: {reason[0]}. Make room, or '
            'set default_hooks.checkpoint.out_dir to a folder that can be written.'
        )
        if self._resumable is None:
            raise OSError(self._failure)
        runner.logger.error(
            f'{self._failure} Training goes on, and the next save tries again; the '
            f'last good checkpoint is {self._resumable}.'
        )
