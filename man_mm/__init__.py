"""man_mm: supervised local learning for OpenMMLab."""

from man_mm.aux_heads import (
    AugLocalHead,
    AuxHead,
    AuxSite,
    DGLDetHead,
    DGLHead,
    InfoProHead,
    MANClsHead,
    MANDetHead,
    MANHead,
    MANSRHead,
    MomentumHead,
    PredSimHead,
)
from man_mm.backbones import CIFARResNet
from man_mm.core import (
    CutPartition,
    LocalLearner,
    LocalModule,
    MemoryBank,
    StagePartition,
    UniformPartition,
    Unit,
    split,
)
from man_mm.datasets import STL10, SVHN
from man_mm.engine import (
    AmpLocalLearningOptimWrapper,
    FullyShardedModel,
    FullyShardedRunner,
    LocalLearningOptimWrapper,
    LocalLearningOptimWrapperConstructor,
    MemoryBankHook,
    ShardingHook,
    build_learner,
)
from man_mm.interruptions import ResumeHook, SafeCheckpointHook
from man_mm.measure import BalancedPartition
from man_mm.version import __version__

__all__ = [
    'AmpLocalLearningOptimWrapper',
    'AugLocalHead',
    'AuxHead',
    'AuxSite',
    'BalancedPartition',
    'CIFARResNet',
    'CutPartition',
    'DGLDetHead',
    'DGLHead',
    'FullyShardedModel',
    'FullyShardedRunner',
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
    'ShardingHook',
    'StagePartition',
    'UniformPartition',
    'Unit',
    '__version__',
    'build_learner',
    'split',
]
