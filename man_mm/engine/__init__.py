"""mmengine glue: optimizer wrapper, constructor, hooks."""

from mmengine import registry as root

from man_mm.core import CutPartition, StagePartition, UniformPartition
from man_mm.interruptions.safe_loading import allow_safe_loading
from man_mm.measure import BalancedPartition

from .amp import AmpLocalLearningOptimWrapper
from .constructor import LocalLearningOptimWrapperConstructor, build_learner
from .fully_sharded_model import FullyShardedModel
from .fully_sharded_runner import FullyShardedRunner
from .hooks import MemoryBankHook
from .optim_wrapper import LocalLearningOptimWrapper
from .sharding_hook import ShardingHook

for _partition in (StagePartition, UniformPartition, CutPartition, BalancedPartition):
    root.TASK_UTILS.register_module(module=_partition)
allow_safe_loading()

__all__ = [
    'AmpLocalLearningOptimWrapper',
    'FullyShardedModel',
    'FullyShardedRunner',
    'LocalLearningOptimWrapper',
    'LocalLearningOptimWrapperConstructor',
    'MemoryBankHook',
    'ShardingHook',
    'build_learner',
]
