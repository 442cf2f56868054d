"""ShardingHook: checkpoints of a `FullyShardedModel`."""

from __future__ import annotations

from typing import Any

from mmengine import registry as root
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner

from man_mm.interruptions.checkpoint_hook import SafeCheckpointHook

from .fully_sharded_model import FullyShardedModel


@root.HOOKS.register_module()
class ShardingHook(Hook):
    """Saves a `FullyShardedModel` as a whole; other models are left alone.

    Saving is left to `SafeCheckpointHook`, which lets all
    processes take part.

    Examples:
        >>> from mmengine.registry import HOOKS
        >>> import man_mm
        >>> default_hooks = dict(sharding=dict(type='ShardingHook'))
        >>> type(HOOKS.build(default_hooks['sharding'])).__name__
        'ShardingHook'
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._gathered: dict[str, dict] | None = None

    def before_run(self, runner: Runner) -> None:
        """Refuses, when about to train, what needs whole weights.

        Raises:
            ValueError: If it is configured.
        """
        if not _is_sharded(runner):
            return
        for hook in runner.hooks:
            is_safe = isinstance(hook, SafeCheckpointHook)
            if isinstance(hook, CheckpointHook) and not is_safe:
                raise ValueError(
                    f'{type(hook).__name__} saves what one process has, and the '
                    'weights of FullyShardedModel are spread over all: set '
                    "default_hooks.checkpoint.type='SafeCheckpointHook'."
                )
        heads = runner.optim_wrapper.learner.heads
        troubles = {
            'EMAHook averages': any(isinstance(hook, EMAHook) for hook in runner.hooks),
            'compile traces': bool(runner.cfg.get('compile')),
            'MomentumHead averages': any(hasattr(head, 'follow') for head in heads),
        }
        for trouble, is_there in troubles.items():
            if is_there:
                raise ValueError(
                    f'{trouble} whole weights, of which FullyShardedModel keeps a part '
                    f'on each process: remove {trouble.split()[0]}, or '
                    'model_wrapper_cfg.'
                )
        runner.model.can_save = True

    def gather_state(self, runner: Runner) -> None:
        """Gathers weights and optimizer on all ranks; `SafeCheckpointHook` asks it."""
        if _is_sharded(runner):
            self._gathered = runner.model.gather(runner.optim_wrapper, runner.work_dir)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Puts whole tensors into the checkpoint.

        Raises:
            RuntimeError: If they were not gathered.
        """
        if not _is_sharded(runner):
            return
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            raise RuntimeError(
                'The weights are sharded, and were not gathered for this checkpoint: '
                'only SafeCheckpointHook and what derives from it save them.'
            )
        checkpoint['state_dict'].update(gathered['state_dict'])
        if 'optimizer' in checkpoint:
            checkpoint['optimizer'] = gathered['optimizer']


def _is_sharded(runner: Runner) -> bool:
    return isinstance(runner.model, FullyShardedModel) and runner.model.is_sharded
