"""Where to cut so that the largest module needs the fewest bytes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from man_mm.core.partition import Measure, Unit

from .peaks import Plan, UnitCost, bytes_at_peak, predict

_SUFFIXES = {'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}


def plan_modules(costs: Sequence[UnitCost], num_modules: int) -> Plan:
    """Finds the cuts that minimise the largest module's predicted peak.

    Of equal ones, those with the smallest sum of squared peaks: every other module
    stays as far below the largest as it can.

    Args:
        costs: Costs of all units in the order in which they run.
        num_modules: Number of modules K.

    Raises:
        ValueError: If there are fewer units than modules.
    """
    if not 1 <= num_modules <= len(costs):
        raise ValueError(
            f'partition.num_modules is {num_modules}, but the network has '
            f'{len(costs)} units to learn: give 1 to {len(costs)}.'
        )
    peaks = {
        (start, stop): sum(
            bytes_at_peak(costs[start:stop], stop == len(costs)).values()
        )
        for stop in range(1, len(costs) + 1)
        for start in range(stop)
    }
    kept = [(cost.kept + cost.boundary, cost.boundary) for cost in costs]
    limit, _ = _search(peaks, kept, num_modules, max)

    def squares(score: int, peak: int) -> int | None:
        return score + peak**2 if peak <= limit else None

    _, ends = _search(peaks, kept, num_modules, squares)
    return predict(costs, ends)


def plan_budget(
    costs: Sequence[UnitCost], budget: int, plain: Callable[[], Sequence[UnitCost]]
) -> Plan:
    """Finds the fewest modules that all fit a number of bytes.

    Args:
        costs: Costs of all units in the order in which they run.
        budget: Most bytes above the start of the training step.
        plain: Measures the costs in end-to-end training, for K = 1; called if that
            may fit.

    Raises:
        ValueError: If no partition fits; says by how many bytes the best one fails.
    """
    plans = []
    for num_modules in range(1, len(costs) + 1):
        plan = plan_modules(costs, num_modules)
        if num_modules == 1 and plan.peak <= budget:
            plan = plan_modules(plain(), 1)
        if plan.peak <= budget:
            return plan
        plans.append(plan)
    best = min(plans, key=lambda plan: plan.peak)
    raise ValueError(
        f'partition.memory_budget is {budget} bytes, but no partition needs less than '
        f'{best.peak} ({format_bytes(best.peak)}): {best.peak - budget} bytes '
        f'({format_bytes(best.peak - budget)}) too many. The best one has '
        f'{len(best.modules)} modules; the largest starts with '
        f'{max(best.modules, key=lambda module: module.peak).units[0]!r}. Raise the '
        'budget, or train on smaller or fewer images.'
    )


class BalancedPartition:
    """Cuts where the largest module needs the fewest bytes, as measured at start-up.

    Bytes are counted, not read from an allocator, so the cuts are the same in every
    run. They are those of activations and gradients: what a training step needs above
    the model, its auxiliary heads and the state of the optimizer, with an update after
    each module (``update='module'``). Not counted is what the optimizer needs for a
    moment while it updates, which matters where images are tiny.

    Args:
        num_modules: Number of modules K. Defaults to None, as many as ``memory_budget``
            asks for.
        memory_budget: Most bytes of a module, such as ``'6GiB'``, ``'800MiB'`` or a
            number; the fewest modules that fit are taken. Defaults to None.
        input_shape: Shape ``(N, C, H, W)`` of the largest batch on one device.

    Raises:
        ValueError: If not exactly one of the first two is given, or a value is
            missing or makes no sense.

    Examples:
        >>> from man_mm import BalancedPartition
        >>> from man_mm.measure.peaks import UnitCost
        >>> partition = BalancedPartition(num_modules=2, input_shape=(2, 3, 64, 64))
        >>> saved = dict(a=8, b=4, c=4)
        >>> costs = [UnitCost((name,), saved=count) for name, count in saved.items()]
        >>> partition.cuts([], measure=lambda shape: costs)  # the wrapper measures it
        ['a']
    """

    def __init__(
        self,
        num_modules: int | None = None,
        memory_budget: int | str | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        if (num_modules is None) == (memory_budget is None):
            raise ValueError(
                'BalancedPartition takes either partition.num_modules or '
                'partition.memory_budget.'
            )
        shape = tuple(input_shape or ())
        if len(shape) != 4 or not all(isinstance(x, int) and x > 0 for x in shape):
            raise ValueError(
                'BalancedPartition needs the shape (N, C, H, W) of the largest batch '
                'on one device, such as partition.input_shape=(2, 3, 800, 1333); got '
                f'{input_shape}.'
            )
        self.num_modules = num_modules
        self.budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.input_shape = shape

    def cuts(self, units: Sequence[Unit], measure: Measure) -> list[str]:
        """Names of the units after which to cut.

        Args:
            units: All units, in the order in which they run.
            measure: Measures the costs of all units for an input shape; with
                ``plain=True``, as they are in end-to-end training.

        Raises:
            ValueError: If the units are too few or the budget is too small.
        """
        return self.plan(measure).cuts

    def plan(self, measure: Measure) -> Plan:
        """The cuts with their predicted peaks; arguments and errors as in `cuts`."""
        costs = measure(self.input_shape)
        if self.budget is None:
            return plan_modules(costs, self.num_modules)
        plain = partial(measure, self.input_shape, plain=True)
        return plan_budget(costs, self.budget, plain)


def parse_bytes(text: int | str, key: str = 'partition.memory_budget') -> int:
    """Reads a number of bytes.

    Args:
        text: Such as ``'6GiB'``, ``'1.5 GiB'`` or ``800``.
        key: What it is given as, for the error.

    Raises:
        ValueError: If it is not positive, or has another unit than KiB, MiB or GiB.

    Examples:
        >>> from man_mm.measure.planner import parse_bytes
        >>> parse_bytes('1.5 GiB')
        1610612736
    """
    match = re.fullmatch(r'([\d.]+) ?([KMG]iB)?', str(text).strip())
    try:
        size = int(float(match[1]) * _SUFFIXES.get(match[2], 1))
    except (TypeError, ValueError):
        size = 0
    if size <= 0:
        raise ValueError(
            f"{key} must be a size such as '6GiB', '800MiB' or a number of bytes, got "
            f'{text!r}.'
        )
    return size


def format_bytes(size: int) -> str:
    """Writes a number of bytes in MiB.

    Args:
        size: Number of bytes.

    Examples:
        >>> from man_mm.measure.planner import format_bytes
        >>> format_bytes(3 * 2**19)
        '1.5 MiB'
    """
    return f'{size / 2**20:.1f} MiB'


def _search(
    peaks: Mapping[tuple[int, int], int],
    kept: Sequence[tuple[int, int]],
    num_modules: int,
    join: Callable[[int, int], int | None],
) -> tuple[int, tuple[int, ...]]:
    """The best score of a partition, and where its modules end.

    Args:
        peaks: Peak of the module from one position to another.
        kept: Bytes that a cut after each unit adds to all modules but the next
            and the last, and those that it adds to the last.
        num_modules: Number of modules K.
        join: Adds a module's peak to the score of those before it; None forbids it.
    """
    # By position: the ways to get there that no other one beats in both its score
    # and what it adds to later modules.
    ways: dict[int, list[tuple[int, int, int, tuple[int, ...]]]]
    ways = {0: [(0, 0, 0, ())]}
    for left in reversed(range(num_modules)):
        found = defaultdict(list)
        last = len(kept) - left
        for start, known in ways.items():
            for stop in range(start + 1, last + 1) if left else [last]:
                for score, inner, final, ends in known:
                    extra = inner if left else final
                    joined = join(score, peaks[start, stop] + extra)
                    if joined is not None:
                        added = kept[start - 1] if start else (0, 0)
                        sums = inner + added[0], final + added[1]
                        found[stop].append((joined, *sums, (*ends, stop)))
        ways = {stop: _unbeaten(options) for stop, options in found.items()}
    score, *_, ends = min(ways[len(kept)])
    return score, ends


def _unbeaten(options: list[tuple]) -> list[tuple]:
    # What is added to the last module is nothing, or what is added to the others.
    best = []
    for option in sorted(options):
        if not best or option[1] < best[-1][1]:
            best.append(option)
    return best
