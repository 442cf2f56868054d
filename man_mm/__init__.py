"""man_mm: supervised local learning for OpenMMLab."""

from .aux_heads import (
    AugLocalHead,
    AuxHead,
    AuxSite,
    DGLHead,
    InfoProHead,
    MANClsHead,
    MANDetHead,
    MANHead,
    MANSRHead,
    MomentumHead,
    PredSimHead,
)
from .backbones import CIFARResNet
from .core import (
    BalancedPartition,
    CutPartition,
    LocalLearner,
    LocalModule,
    MemoryBank,
    StagePartition,
    UniformPartition,
    Unit,
    split,
)
from .datasets import STL10, SVHN
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
    'AugLocalHead',
    'AuxHead',
    'AuxSite',
    'BalancedPartition',
    'CIFARResNet',
    'CutPartition',
    'DGLHead',
    'InfoProHead',
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
    'MomentumHead',
    'PredSimHead',
    'ResumeHook',
    'SafeCheckpointHook',
    'STL10',
    'SVHN',
    'ShardedModel',
    'StagePartition',
    'UniformPartition',
    'Unit',
    '__version__',
    'build_learner',
    'split',
]
