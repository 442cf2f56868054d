"""man_mm: supervised local learning for OpenMMLab."""

from .aux_heads import (
    AuxHead,
    AuxSite,
    MANClsHead,
    MANDetHead,
    MANHead,
    MANSRHead,
)
from .core import (
    BalancedPartition,
    CutPartition,
    LocalLearner,
    LocalModule,
    MemoryBank,
    StagePartition,
    Unit,
    split,
)
from .engine import (
    AmpLocalLearningOptimWrapper,
    LocalLearningOptimWrapper,
    LocalLearningOptimWrapperConstructor,
    MemoryBankHook,
    ResumeHook,
    SafeCheckpointHook,
    ShardedModel,
    build_learner,
)
from .version import __version__

__all__ = [
    'AmpLocalLearningOptimWrapper',
    'AuxHead',
    'AuxSite',
    'BalancedPartition',
    'CutPartition',
    'LocalLearner',
    'LocalLearningOptimWrapper',
    'LocalLearningOptimWrapperConstructor',
    'LocalModule',
    'MANClsHead',
    'MANDetHead',
    'MANHead',
    'MANSRHead',
    'MemoryBank',
    'MemoryBankHook',
    'ResumeHook',
    'SafeCheckpointHook',
    'ShardedModel',
    'StagePartition',
    'Unit',
    '__version__',
    'build_learner',
    'split',
]
