"""Resuming: random state in checkpoints, and checkpoints that hold nothing but data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine import registry as root
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner


def get_random_state() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, as plain data."""
    version, keys, *rest = np.random.get_state()
    python_version, python_state, gauss = random.getstate()
    return dict(
        python=[python_version, list(python_state), gauss],
        numpy=[version, torch.from_numpy(keys.astype(np.int64)), *rest],
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `get_random_state` returned."""
    version, python_state, gauss = state['python']
    random.setstate((version, tuple(python_state), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])


def to_plain_data(checkpoint: dict[str, Any]) -> None:
    """Replaces, in place, what torch does not load safely.

    Log buffers become dictionaries of tensors, numpy's numbers Python's. Functions
    that schedulers keep are left out: loading a state leaves their own in place.
    """
    hub = checkpoint['message_hub']
    buffers = {
        name: dict(
            log_history=torch.as_tensor(buffer._log_history),
            count_history=torch.as_tensor(buffer._count_history),
            max_length=buffer.max_length,
        )
        for name, buffer in hub['log_scalars'].items()
    }
    info = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in hub['runtime_info'].items()
    }
    checkpoint['message_hub'] = {**hub, 'log_scalars': buffers, 'runtime_info': info}
    schedulers = checkpoint.get('param_schedulers')
    if isinstance(schedulers, list):
        checkpoint['param_schedulers'] = [
            {key: value for key, value in state.items() if not callable(value)}
            for state in schedulers
        ]


def from_plain_data(checkpoint: dict[str, Any]) -> None:
    """Restores, in place, the log buffers that `to_plain_data` replaced."""
    scalars = checkpoint.get('message_hub', {}).get('log_scalars', {})
    for name, buffer in scalars.items():
        if isinstance(buffer, dict):
            arrays = {
                key: buffer[f'{key}_history'].cpu().numpy() for key in ('log', 'count')
            }
            scalars[name] = HistoryBuffer(
                arrays['log'], arrays['count'], buffer['max_length']
            )


@root.HOOKS.register_module()
class ResumeHook(Hook):
    """Makes a resumed run repeat an uninterrupted one, and checkpoints readable.

    It saves the random state with each checkpoint and restores it on resuming.
    Validation runs on a state of its own, so that training does not depend on when
    it is validated. Rank 0's state is saved; other ranks keep theirs.

    It also turns the objects that mmengine pickles into plain data, so that stock
    tools read the checkpoint with the safe loading of torch 2.6 and later.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the state, unless the checkpoint is for publishing only."""
        to_plain_data(checkpoint)
        if 'optimizer' in checkpoint:
            checkpoint['random_state'] = get_random_state()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes the state out of a checkpoint that is resumed."""
        from_plain_data(checkpoint)
        if runner._resume:
            self._resumed = checkpoint.get('random_state')

    def before_train_epoch(self, runner: Runner) -> None:
        """Restores the state once, when the data loader stands at its old place."""
        if self._resumed is None:
            return
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _RestoreAfter(
                loop.dataloader_iterator, runner.iter, self._resumed
            )
        else:
            set_random_state(self._resumed)
        self._resumed = None

    def before_val(self, runner: Runner) -> None:
        """Keeps the training state."""
        self._before_val = get_random_state()

    def after_val(self, runner: Runner) -> None:
        """Returns to the training state."""
        if self._before_val is not None:
            set_random_state(self._before_val)


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
