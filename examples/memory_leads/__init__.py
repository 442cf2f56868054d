"""What a memory could carry: the leads of docs/memory_bank.md, as auxiliary heads.

Each head is a MAN head whose loss has a second term, which reads a memory that outlives
the batch. Memories are buffers, so they are fixed in size, saved and resumed with the
head. To compare, from the folder of the clone:

    PYTHONPATH=examples mim run man_mm compare @benchmarks/comparisons/memory_leads.txt
"""

from .classifiers import (
    Contrast,
    NextGradient,
    Prototypes,
    Reconciled,
    Retrieval,
    RunningHead,
    SoftLabels,
)
from .detectors import DetContrast, DetPrototypes
from .restorers import SRPrototypes

__all__ = [
    'Contrast',
    'DetContrast',
    'DetPrototypes',
    'NextGradient',
    'Prototypes',
    'Reconciled',
    'Retrieval',
    'RunningHead',
    'SRPrototypes',
    'SoftLabels',
]
