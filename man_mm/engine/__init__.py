"""mmengine glue: optimizer wrapper, constructor, hooks."""

from mmengine import registry as root

from man_mm.core import (
    BalancedPartition,
    CutPartition,
    StagePartition,
    UniformPartition,
)

from . import compat
from .constructor import LocalLearningOptimWrapperConstructor, build_learner
from .hooks import MemoryBankHook
from .optim_wrapper import LocalLearningOptimWrapper
from .resume import ResumeHook

for _partition in (StagePartition, UniformPartition, CutPartition, BalancedPartition):
    root.TASK_UTILS.register_module(module=_partition)
compat.allow_safe_loading()

__all__ = [
    'LocalLearningOptimWrapper',
    'LocalLearningOptimWrapperConstructor',
    'MemoryBankHook',
    'ResumeHook',
    'build_learner',
]
