"""man_mm: supervised local learning for OpenMMLab.

Without mmengine, only what is in plain PyTorch, ``man_mm.core``, can be imported.
"""

from importlib.util import find_spec

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
from man_mm.stack import INSTALL, check_stack
from man_mm.version import __version__

if find_spec('mmengine'):
    check_stack()
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
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ImportError(
                f'man_mm.{name} needs mmengine. {INSTALL}', name='mmengine'
            )
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


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
