"""SafeCheckpointHook: a failed or interrupted save costs no earlier checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import dist
from mmengine import registry as root
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from .files import BACKEND, AtomicBackend, checkpoints_streamed

_STATE = ('last_ckpt', 'keep_ckpt_ids', 'best_ckpt_path', 'best_ckpt_path_dict')


@root.HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, safe against interruptions and full disks.

    - A checkpoint is written to a temporary file and renamed. Older ones and the
      previous best one are removed after that.
    - A save that fails, as on a full disk, is an error in the log. Training goes on as
      long as there is an earlier checkpoint to resume from, and the next save tries
      again. If the last save of a run failed, the run ends with an error.
    - What was saved just before a validation is saved again after it, so that a
      resumed run knows its results.
    - Checkpoints hold data only, so that stock tools read them with torch's safe
      loading. Histories of logged values, which are objects, are left
      out: a resumed run starts their averages anew.

    It takes the arguments of ``CheckpointHook``. On other storage than local files,
    and with ``backend_args``, writing is left to that backend.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', interval=1))
        >>> type(HOOKS.build(default_hooks['checkpoint'])).__name__
        'SafeCheckpointHook'
    """

    _failure: str | None = None  # of the latest save
    _saved = False  # since the latest validation

    def before_train(self, runner: Runner) -> None:
        """Prepares saving."""
        given = self.backend_args or self.file_client_args
        if not given and '://' not in str(self.out_dir):
            self.backend_args = dict(backend=BACKEND)
        super().before_train(runner)
        self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Saves the best checkpoint, and again what the validation belongs to."""
        step = runner.epoch if self.by_epoch else runner.iter
        name = self.filename_tmpl.format(step)
        self._saved = Path(self.last_ckpt or '').name != name
        super().after_val_epoch(runner, metrics)
        if not self._saved:
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

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves out what is not data: resuming does not need it."""
        hub = checkpoint['message_hub']
        info = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in hub['runtime_info'].items()
        }
        keys = {key: value for key, value in hub['resumed_keys'].items() if key in info}
        checkpoint['message_hub'] = dict(
            log_scalars={}, runtime_info=info, resumed_keys=keys
        )
        schedulers = checkpoint.get('param_schedulers')
        if isinstance(schedulers, list):
            # Functions: loading a state leaves a scheduler's own in place.
            checkpoint['param_schedulers'] = [
                {key: value for key, value in state.items() if not callable(value)}
                for state in schedulers
            ]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        if not self.save_best:
            return
        with self._all_or_nothing(runner, 'The best checkpoint'):
            super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict[str, Any]
    ) -> None:
        with self._all_or_nothing(runner, self.filename_tmpl.format(step)):
            super()._save_checkpoint_with_step(runner, step, meta)
            self._saved, self._failure = True, None

    @contextmanager
    def _all_or_nothing(self, runner: Runner, name: str) -> Iterator[None]:
        """Undoes a save that fails, on all ranks; then goes on if that loses nothing.

        Raises:
            OSError: If there is no earlier checkpoint.
        """
        own, info = vars(self), runner.message_hub.runtime_info
        before = copy.deepcopy({key: own[key] for key in _STATE if key in own})
        info_before = dict(info)
        runner.call_hook('gather_state')
        reason: list[str | None] = [None]
        try:
            with checkpoints_streamed():
                yield
        except OSError as error:
            reason = [error.strerror or str(error)]
        dist.broadcast_object_list(reason)
        if isinstance(self.file_backend, AtomicBackend):
            self.file_backend.finish(remove=reason[0] is None)
        if reason[0] is None:
            return
        own.update(before)
        info.clear()
        info.update(info_before)
        self._failure = (
            f'{name} could not be saved in {self.out_dir}: {reason[0]}. Make room, or '
            'set default_hooks.checkpoint.out_dir to a folder that can be written.'
        )
        if self.last_ckpt is None:
            raise OSError(self._failure)
        runner.logger.error(
            f'{self._failure} Training goes on, and the next save tries again; the '
            f'last good checkpoint is {self.last_ckpt}.'
        )
