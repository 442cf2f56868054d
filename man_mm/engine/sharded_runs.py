"""What a run with a `ShardedModel` does at its start and for its checkpoints."""

from __future__ import annotations

from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from .checks import check_wrapper_type
from .sharded_model import ShardedModel


def start_sharding(runner: Runner) -> None:
    """Shards a `ShardedModel` that is about to train; leaves other models alone.

    Args:
        runner: The runner, with everything loaded and resumed.

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
                f'{trouble} whole weights, of which ShardedModel keeps a part on each '
                f'rank: remove {trouble.split()[0]}, or model_wrapper_cfg.'
            )
    runner.model.shard(runner.optim_wrapper)


def gather_for_checkpoint(runner: Runner) -> None:
    """Gathers a `ShardedModel` and its optimizer before rank 0 saves, on all ranks.

    Args:
        runner: The runner.
    """
    sharding = getattr(runner.optim_wrapper, 'sharding', None)
    if sharding is not None:
        sharding.gather()
        sharding.gather_optimizer()


def check_gathered(runner: Runner) -> None:
    """Refuses to save weights that are not there.

    Args:
        runner: The runner.

    Raises:
        RuntimeError: If model and optimizer are sharded, and were not gathered.
    """
    sharding = getattr(runner.optim_wrapper, 'sharding', None)
    if sharding is not None:
        sharding.optimizer_state()
