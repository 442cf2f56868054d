"""ShardingHook: what a run with a `ShardedModel` does at its start and when saving."""

from __future__ import annotations

from mmengine import registry as root
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from .checks import check_wrapper_type
from .sharded_model import ShardedModel


@root.HOOKS.register_module()
class ShardingHook(Hook):
    """Shards a `ShardedModel` when training starts, and gathers it for checkpoints."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Shards the model, with everything loaded and resumed.

        Raises:
            ValueError: If something configured needs the whole model in training.
        """
        if not isinstance(runner.model, ShardedModel):
            return
        check_wrapper_type(type(runner.optim_wrapper).__name__)
        troubles = {
            'EMAHook averages': any(isinstance(hook, EMAHook) for hook in runner.hooks),
            'compile traces': bool(runner.cfg.get('compile')),
            'MomentumHead averages': any(
                hasattr(head, 'follow') for head in runner.optim_wrapper.learner.heads
            ),
        }
        for trouble, is_there in troubles.items():
            if is_there:
                raise ValueError(
                    f'{trouble} whole weights, of which ShardedModel keeps a part on '
                    f'each rank: remove {trouble.split()[0]}, or model_wrapper_cfg.'
                )
        runner.model.shard(runner.optim_wrapper)

    def gather_state(self, runner: Runner) -> None:
        """Gathers weights and optimizer on all ranks; `SafeCheckpointHook` asks it."""
        sharding = getattr(runner.optim_wrapper, 'sharding', None)
        if sharding is not None:
            sharding.gather()
            sharding.gather_optimizer()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuses to save weights that are not there.

        Raises:
            RuntimeError: If model and optimizer are sharded, and were not gathered.
        """
        sharding = getattr(runner.optim_wrapper, 'sharding', None)
        if sharding is not None:
            sharding.optimizer_state()
