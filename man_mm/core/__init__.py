"""The method in plain PyTorch; imports nothing of OpenMMLab."""

from .bank import MemoryBank
from .compressed_activations import CompressedActivations
from .exact_steps import ExactSteps
from .learner import LocalLearner
from .partition import (
    CutPartition,
    LocalModule,
    StagePartition,
    UniformPartition,
    Unit,
    split,
)

__all__ = [
    'CompressedActivations',
    'CutPartition',
    'ExactSteps',
    'LocalLearner',
    'LocalModule',
    'MemoryBank',
    'StagePartition',
    'UniformPartition',
    'Unit',
    'split',
]
