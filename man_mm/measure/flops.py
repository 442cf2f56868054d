"""Floating-point operations of a call."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_flops(fn: Callable[[], object]) -> int:
    """Runs ``fn`` once and counts its floating-point operations.

    Matrix products, convolutions and attention count, forward, backward and what is
    recomputed, a multiplication and an addition each as one; all other ops are free.

    Args:
        fn: Called without arguments; its result is dropped.

    Examples:
        >>> import torch
        >>> from man_mm.measure import count_flops
        >>> count_flops(lambda: torch.rand(2, 3) @ torch.rand(3, 4))  # 2 * 2 * 3 * 4
        48
    """
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()
