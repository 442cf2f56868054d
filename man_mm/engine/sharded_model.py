"""ShardedModel: data parallel training of models that one GPU cannot train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmengine import registry as root
from torch import Tensor, nn

from .distributed import broadcast_module
from .sharding import Sharding

if TYPE_CHECKING:
    from .optim_wrapper import LocalLearningOptimWrapper


@root.MODEL_WRAPPERS.register_module()
class ShardedModel(nn.Module):
    """Trains like ``MMDistributedDataParallel``, with a part of the model on each rank.

    Parameters, auxiliary heads, gradients and the optimizer's state are split over the
    ranks; see `man_mm.engine.sharding.Sharding`. Until training starts, and while it
    validates, tests or saves, each rank has the whole model (and no gradients).
    Checkpoints are those of an unsharded run. It is used by these lines of a config,
    and ``--launcher pytorch``::

        model_wrapper_cfg = dict(type='ShardedModel')
        default_hooks = dict(
            sharding=dict(type='ShardingHook'),
            checkpoint=dict(type='SafeCheckpointHook'))

    Args:
        module: The model, on its device. All ranks get the weights of rank 0.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._sharding: Sharding | None = None
        broadcast_module(module)

    def shard(self, optim_wrapper: LocalLearningOptimWrapper) -> None:
        """Splits model and optimizer, when both are initialised, loaded and resumed.

        Args:
            optim_wrapper: The optimizer wrapper that trains the model.
        """
        self._sharding = optim_wrapper.shard()

    def gather(self) -> None:
        """Gives the model its weights until the next training step, on all ranks."""
        if self._sharding is not None:
            self._sharding.gather()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the whole model, for other things than training."""
        self.gather()
        return self.module(*args, **kwargs)

    def train_step(
        self, data: Any, optim_wrapper: LocalLearningOptimWrapper
    ) -> dict[str, Tensor]:
        """Trains on a batch; see ``BaseModel.train_step`` of mmengine.

        Raises:
            ValueError: If nothing has sharded the model.
        """
        if self._sharding is None:
            raise ValueError(
                'ShardedModel is started by ShardingHook, which is not configured. Add '
                'to the config:\n    default_hooks = '
                "dict(sharding=dict(type='ShardingHook'))"
            )
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """Predicts; see ``BaseModel.val_step`` of mmengine."""
        self.gather()
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """Predicts; see ``BaseModel.test_step`` of mmengine."""
        self.gather()
        return self.module.test_step(data)
