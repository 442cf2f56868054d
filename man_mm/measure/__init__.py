"""What training needs: bytes, FLOPs, and where to cut so that it needs less."""

from .flops import count_flops
from .memory import MemoryReport, measure_memory
from .planner import BalancedPartition
from .uncomputed import Uncomputed

__all__ = [
    'BalancedPartition',
    'MemoryReport',
    'Uncomputed',
    'count_flops',
    'measure_memory',
]
