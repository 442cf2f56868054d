"""Looks for the cuts with which steps in modules fit a card."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from man_mm.measure.peaks import Plan, exact_costs
from man_mm.measure.planner import plan_modules

from .card_needs import Counter, Need, usable
from .schemes import JOINT, LOCAL

_TRIES = 4  # partitions without, and with recomputed layers

_Try = tuple[tuple[str, ...], tuple[str, ...]]  # cuts, and names to recompute


def search(counter: Counter, base: str, first: Need, limit: int) -> Need:
    """The fewest modules that fit a card, or what needs least of those tried.

    Where cuts of the backbone are not enough, layers with attention behind it are
    recomputed besides.

    Args:
        counter: Counts what a partition needs.
        base: ``'exact'``, ``'joint'`` or ``'local'``.
        first: What the steps need so far.
        limit: Bytes of the card.
    """
    best, tried = first, {(first.cuts, first.recompute)}
    for cuts, recompute in _tries(counter, base, first, limit):
        if (cuts, recompute) in tried:
            continue
        tried.add((cuts, recompute))
        need = counter.count(base, base, cuts, recompute)
        best = min(best, need, key=lambda need: need.peak)
        if need.fits(limit):
            return need
    return best


def _tries(counter: Counter, base: str, first: Need, limit: int) -> Iterator[_Try]:
    costs = counter.costs
    if base != LOCAL:
        costs = exact_costs(costs, with_heads=base == JOINT)
    room = usable(limit) - first.kinds['parameters'] - first.kinds['optimizer state']
    plans = [plan_modules(costs, count) for count in range(2, len(costs) + 1)]
    fitting = (plan for plan in plans if plan.peak <= room)
    for plan in islice(fitting, _TRIES):
        yield tuple(plan.cuts), ()
    layers = tuple(counter.layers)
    if layers:
        yield first.cuts, layers
        # What the last module needs then is not predicted.
        fitting = (plan for plan in plans if _inner_peak(plan) <= room)
        for plan in islice(fitting, _TRIES):
            yield tuple(plan.cuts), layers
    if plans:
        yield tuple(min(plans, key=lambda plan: plan.peak).cuts), layers


def _inner_peak(plan: Plan) -> int:
    return max(module.peak for module in plan.modules[:-1])
