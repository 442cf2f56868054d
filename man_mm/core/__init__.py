"""The method in plain PyTorch; imports nothing of OpenMMLab."""

from .bank import MemoryBank
from .learner import LocalLearner
from .partition import (
    CutPartition,
    LocalModule,
    StagePartition,
    UniformPartition,
    Unit,
    split,
)
from .pipeline import ModulePipeline
from .plan import BalancedPartition

__all__ = [
    'BalancedPartition',
    'CutPartition',
    'LocalLearner',
    'LocalModule',
    'MemoryBank',
    'ModulePipeline',
    'StagePartition',
    'UniformPartition',
    'Unit',
    'split',
]
