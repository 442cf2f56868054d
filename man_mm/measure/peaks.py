"""What the modules of a partition need, predicted from what units cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

KINDS = ('held', 'saved', 'head', 'gradients', 'temporaries')


@dataclass(frozen=True)
class UnitCost:
    """Bytes that a unit costs in a training step, as a module of its own.

    A unit in which nothing is trainable counts with the one after it, since it
    cannot be a module.

    Attributes:
        names: Names of the unit and of the frozen ones before it.
        held: Alive when it starts, its input included: images, skip connections,
            what the memory bank keeps of stage ends.
        forward: Peak of its forward pass above ``held``.
        saved: What its forward pass leaves for the backward pass, output included.
        head: Peak of the forward and backward pass of all that follows in the
            module: the auxiliary head, or neck, heads and loss of the network.
        head_grads: What that leaves: gradients of its parameters, mostly.
        backward: Peak of the unit's backward pass above its start.
        grads: Gradients of its parameters.
        output: Its output, and thus the gradient of its output.
        ends_stage: Whether its output may be read by more than the next unit.
        shared: Whether it is.
        kept: What the bank keeps of its output for auxiliary heads, beyond the next
            module, if the network is cut here.
        boundary: What exact steps keep of its output, to the end of the forward pass,
            if the network is cut here.
        entry: Its input, if it is the first unit and what is in front of what trains
            is frozen; exact steps keep it, too.
        whole: Its output for all images, if it runs on a micro-batch at a time, in
            which case ``forward``, ``saved``, ``head``, ``backward`` and ``output``
            are of a micro-batch; else 0.
    """

    names: tuple[str, ...]
    held: int = 0
    forward: int = 0
    saved: int = 0
    head: int = 0
    head_grads: int = 0
    backward: int = 0
    grads: int = 0
    output: int = 0
    ends_stage: bool = False
    shared: bool = False
    kept: int = 0
    boundary: int = 0
    entry: int = 0
    whole: int = 0


def exact_costs(costs: Sequence[UnitCost], with_heads: bool = False) -> list[UnitCost]:
    """What units cost in exact or joint steps, of which every boundary is kept.

    Args:
        costs: What they cost in local steps.
        with_heads: Whether there are auxiliary heads: steps are joint. Defaults to
            False.
    """
    without = {} if with_heads else dict(head=0, head_grads=0)
    exact = []
    for cost in costs[:-1]:
        # What others read is held in any case.
        boundary = 0 if cost.shared else cost.whole or cost.output
        exact.append(replace(cost, kept=0, boundary=boundary, **without))
    exact.append(costs[-1])
    entry = exact[0].entry
    return [exact[0], *(replace(cost, held=cost.held + entry) for cost in exact[1:])]


@dataclass(frozen=True)
class PlannedModule:
    """A module and its predicted peak.

    Attributes:
        units: Names of its units.
        kinds: Bytes at its peak: ``held`` from before it, ``saved`` activations,
            its ``head``, ``gradients`` and other ``temporaries``.
    """

    units: tuple[str, ...]
    kinds: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes above the start of the training step."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Plan:
    """A partition and its predicted peaks.

    Attributes:
        modules: The modules in the order in which they run.
    """

    modules: tuple[PlannedModule, ...]

    @property
    def cuts(self) -> list[str]:
        """Names of the units after which to cut, the last unit excluded."""
        return [module.units[-1] for module in self.modules[:-1]]

    @property
    def peak(self) -> int:
        """Bytes of the largest module, above the start of the training step."""
        return max(module.peak for module in self.modules)


def predict(costs: Sequence[UnitCost], ends: Sequence[int]) -> Plan:
    """Predicts the peak of every module of a partition.

    Args:
        costs: Costs of all units in the order in which they run.
        ends: For each module, how many units it and those before it have.
    """
    modules, kept, boundaries = [], 0, 0
    for start, stop in zip([0, *ends], ends, strict=False):
        names = tuple(name for cost in costs[start:stop] for name in cost.names)
        kinds = bytes_at_peak(costs[start:stop], stop == len(costs))
        kinds['held'] += boundaries + (kept if stop < len(costs) else 0)
        modules.append(PlannedModule(names, kinds))
        if start:
            kept += costs[start - 1].kept
            boundaries += costs[start - 1].boundary
    return Plan(tuple(modules))


def bytes_at_peak(costs: Sequence[UnitCost], is_last: bool) -> dict[str, int]:
    """Bytes by kind at the peak of a module.

    Args:
        costs: Costs of its units.
        is_last: Whether it ends the network.
    """
    phases = _in_slices(costs, is_last) if costs[-1].whole else _phases(costs)
    peak = max(phases, key=lambda phase: phase.total())
    # What the head frees, such as maps in the bank, was held.
    peak['held'] += costs[0].held + min(peak['gradients'], 0)
    peak['gradients'] = max(peak['gradients'], 0)
    return {kind: peak[kind] for kind in KINDS}


def _phases(costs: Sequence[UnitCost]) -> Iterator[Counter]:
    """What is alive in forward pass, head and backward pass, beside what is held."""
    *inner, end = costs
    saved, given = 0, end.boundary  # exact steps start with the gradient of the output
    for cost in costs:
        yield Counter(saved=saved, gradients=given, temporaries=cost.forward)
        saved += cost.saved
    # In joint steps, a head that reads nothing but the boundary runs before.
    is_early = given and not any(cost.ends_stage for cost in inner)
    yield Counter(saved=given if is_early else saved, gradients=given, head=end.head)
    # Maps that others read, too, have gradients from the start of the backward pass.
    gradients = end.head_grads + sum(cost.output for cost in inner if cost.shared)
    for cost in reversed(costs):
        yield Counter(
            saved=saved, gradients=gradients + cost.output, temporaries=cost.backward
        )
        saved -= cost.saved
        gradients += cost.grads
        if cost is end and not given:
            saved += cost.output  # stays, for the next module


def _in_slices(costs: Sequence[UnitCost], is_last: bool) -> Iterator[Counter]:
    """The same on micro-batches, when those before have left maps and gradients."""
    *inner, end = costs
    maps = end.whole
    maps += sum(c.whole for c in inner if (c.shared if is_last else c.ends_stage))
    left = Counter(saved=maps, gradients=sum(c.grads for c in costs) + end.head_grads)
    late = [replace(cost, grads=0, head_grads=0) for cost in costs]
    if is_last:
        # All images go through the head at once. Then the units run again, slice by
        # slice; to the last one, the gradients of its parameters are new.
        yield Counter(saved=maps, head=end.head)
        left['gradients'] += maps
        late[-1] = replace(late[-1], head=0, backward=end.backward - end.grads)
    for phase in _phases(late):
        phase.update(left)
        yield phase
