"""mmengine glue: optimizer wrapper, constructor, hooks."""

from mmengine import registry as root

from man_mm.core import (
    BalancedPartition,
    CutPartition,
    StagePartition,
    UniformPartition,
)

from . import compat
from .amp import AmpLocalLearningOptimWrapper
from .constructor import LocalLearningOptimWrapperConstructor, build_learner
from .hooks import MemoryBankHook
from .optim_wrapper import LocalLearningOptimWrapper
from .resume import ResumeHook
from .saving import SafeCheckpointHook
from .sharded_model import ShardedModel

for _partition in (StagePartition, UniformPartition, CutPartition, BalancedPartition):
    root.TASK_UTILS.register_module(module=_partition)
compat.allow_safe_loading()
compat.allow_cpu_ranks()

__all__ = [
    'AmpLocalLearningOptimWrapper',
    'LocalLearningOptimWrapper',
    'LocalLearningOptimWrapperConstructor',
    'MemoryBankHook',
    'ResumeHook',
    'SafeCheckpointHook',
    'ShardedModel',
    'build_learner',
]
