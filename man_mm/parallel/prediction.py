"""What a step of a pipeline takes, predicted from what its modules take alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise


@dataclass(frozen=True)
class Link:
    """What a rank waits for a packet that has been sent already.

    Attributes:
        latency: Seconds for the smallest packet.
        bandwidth: Bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, count: int) -> float:
        """Seconds for a packet of ``count`` bytes."""
        return self.latency + count / self.bandwidth


def group_modules(seconds: Sequence[float], ranks: int) -> list[int]:
    """How many consecutive modules each rank gets, so that the slowest is fastest.

    Args:
        seconds: Of each module.
        ranks: Number of ranks, at most that of modules.

    Examples:
        >>> from man_mm.parallel.prediction import group_modules
        >>> group_modules([1.0, 2.0, 1.0, 4.0], ranks=2)
        [3, 1]
    """
    candidates = combinations(range(1, len(seconds)), ranks - 1)
    sizes = [
        [stop - start for start, stop in pairwise((0, *cuts, len(seconds)))]
        for cuts in candidates
    ]
    return min(sizes, key=lambda sizes: max(_sums(seconds, sizes)))


def predict_step(
    seconds: Sequence[float],
    sizes: Sequence[int],
    sent: Sequence[int],
    link: Link,
    slowdown: float = 1.0,
) -> float:
    """Seconds a batch of a pipeline that is full: those of its slowest rank.

    Sending is hidden behind the next batch, receiving is not. While all ranks work,
    each takes ``slowdown`` times as long as alone, and those that wait slow nobody
    down; in between, what a rank loses grows with the number of the others.

    Args:
        seconds: Of each module, from its forward pass to its update, alone.
        sizes: How many modules each rank has.
        sent: Bytes of the packet that would be sent after each module but the last.
        link: Between neighbours.
        slowdown: Of one rank while all others work. Defaults to 1, as with processors
            of its own.

    Examples:
        >>> from man_mm.parallel.prediction import Link, predict_step
        >>> link = Link(latency=0.001, bandwidth=1e9)
        >>> predict_step([1.0, 2.0, 3.0], sizes=[2, 1], sent=[10**6, 10**6], link=link)
        3.002
    """
    ends = list(accumulate(sizes))[:-1]
    waits = [0.0, *(link.seconds(sent[end - 1]) for end in ends)]
    work = sorted(a + b for a, b in zip(_sums(seconds, sizes), waits, strict=True))
    total = 0.0
    for done, (before, after) in enumerate(pairwise([0.0, *work])):
        others = (len(work) - done - 1) / max(len(work) - 1, 1)
        total += (after - before) * (1 + (slowdown - 1) * others)
    return total


def _sums(seconds: Sequence[float], sizes: Sequence[int]) -> list[float]:
    bounds = pairwise(accumulate(sizes, initial=0))
    return [sum(seconds[start:stop]) for start, stop in bounds]
