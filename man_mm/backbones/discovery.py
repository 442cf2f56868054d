"""Finds the units of a backbone that has no adapter, from one forward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from man_mm.core import Unit
from man_mm.core.returned import sizes_of, tensors_in

from .token_maps import AsMap, map_kind, same_map
from .trace import Call, Trace, recording

_STAGES = 4  # of a network that has none of its own


def discover_units(backbone: nn.Module, image: Tensor) -> list[Unit]:
    """Lists the units of a backbone: the blocks between which one map is handed on.

    The backbone runs once without gradients. A block is a submodule inside nothing
    but sequences and stages. The network can be cut behind a block that outputs a map
    ``(N, C, H, W)`` or ``(N, H, W, C)``, or tokens ``(N, H * W, C)``, if that is all
    that later operations read of what was computed before, if nothing changes it in
    place, and if the next block takes it as its first argument, perhaps laid out in
    another way, or what the backbone returns of it. Blocks between which it cannot be
    cut form one unit, and so do convolutions with the norms and activations behind
    them.

    A stage ends where the backbone returns a map, or, if it returns one only, where
    the resolution falls. A network of one resolution has four equal stages.

    Args:
        backbone: A network that takes images; in evaluation mode.
        image: Square image ``(1, C, H, W)`` of a size that it takes.

    Returns:
        The units in the order in which they run; none if the network computes on
        several paths from the start.
    """
    trace = Trace(image, backbone.parameters())
    with torch.no_grad(), recording(backbone, trace), trace:
        outputs = tensors_in(backbone(image))
    if not outputs:
        return []
    path = trace.ancestors(outputs[-1])
    returned = {id(x) for x in outputs[:-1]}
    read_beside = trace.read_outside(path) | returned
    groups = _group(trace, _calls(trace, path), path, read_beside)
    if any(_leaks(trace, group, path, returned) for group in groups[:-1]):
        return []
    owners = _owners(trace, backbone, groups, path)
    if owners is None:
        return []
    lasts = [group[-1] for group in groups]
    kinds = [map_kind(last.tensor) for last in lasts]
    maps = [
        kind(last.tensor, (*last.args, *sizes_of(last.output)))
        for kind, last in zip(kinds, lasts, strict=True)
    ]
    ends = [trace.is_end(a[-1], b[0], path, read_beside) for a, b in pairwise(groups)]
    stages = _stages([map_.shape[-1] for map_ in maps], ends)
    units = []
    for index, group in enumerate(groups):
        before = [*groups[index - 1][-1:], *group] if index else group
        gaps = not all(_hands_on(a, b) for a, b in pairwise(before))
        unit = Unit(
            group[-1].name,
            stages[index],
            tuple(call.name for call in group),
            tuple(name for name, owner in owners.items() if owner == index),
            read_elsewhere=index < len(ends) and ends[index],
            as_map=None if _is_of_maps(group, gaps, kinds[index]) else kinds[index],
            gaps=gaps,
        )
        units.append(unit)
    return units


def _calls(trace: Trace, path: set[int]) -> list[Call]:
    """The calls on the path, those inside of stages instead of those that hold cuts."""
    uses = Counter(id(call.module) for call in trace.calls)
    calls, inside = [], []
    for index, call in enumerate(trace.calls):
        if not call.is_on(path) or any(call.is_in(whole) for whole in inside):
            continue
        inner = [c for c in trace.calls[index:] if c.is_in(call) and c.is_on(path)]
        if _holds_cuts(trace, call, inner):
            continue
        inside.append(call)
        is_step = uses[id(call.module)] == 1 or call.has_weights
        if is_step and trace.reads_image(call):
            calls.append(call)
    return calls


def _holds_cuts(trace: Trace, call: Call, inner: Sequence[Call]) -> bool:
    """Whether a stage can be cut inside, or behind a block but not behind itself."""
    between = (
        trace.can_cut(a) and b.has_weights and _hands_on(a, b)
        for a, b in pairwise(inner)
    )
    if map_kind(call.output) is None:
        return any(trace.can_cut(block) for block in inner)
    return any(between)


def _group(
    trace: Trace, calls: list[Call], path: set[int], read_beside: set[int]
) -> list[list[Call]]:
    """Groups the calls by units, up to the last one with weights."""
    calls = list(calls)
    while calls and not (trace.can_cut(calls[-1]) and _belongs(calls[-1], calls)):
        calls.pop()
    if not calls or not all(trace.follows_from_image(call.input) for call in calls):
        return []
    groups: list[list[Call]] = [calls[:1]]
    for call, following in pairwise(calls):
        is_end = trace.is_end(call, following, path, read_beside)
        is_next = trace.hands_on(call, following, path)
        starts = is_end or (following.has_weights and is_next)
        # Of what returns a size too, only blocks of a list: no patch embedding.
        is_block = isinstance(call.output, Tensor) or (
            type(call.module) is type(following.module)
        )
        if starts and is_block and trace.can_cut(call):
            groups.append([])
        groups[-1].append(following)
    return groups


def _belongs(call: Call, calls: Sequence[Call]) -> bool:
    """Whether the last call ends a unit: no global pooling, nor what follows one."""
    return call.has_weights or (
        any(call.input is other.tensor for other in calls)
        and call.input.shape[2:] == call.tensor.shape[2:]
    )


def _leaks(
    trace: Trace, group: Sequence[Call], path: set[int], returned: set[int]
) -> bool:
    """Whether a map inside a unit is read elsewhere: its graph would be gone."""
    times = range(group[0].start, group[-1].stop)
    made = trace.made_by(times) - {id(group[-1].tensor)}
    return not made.isdisjoint(returned | trace.read_outside(path.union(times)))


def _owners(
    trace: Trace, backbone: nn.Module, groups: Sequence[Sequence[Call]], path: set[int]
) -> dict[str, int] | None:
    """Parameters outside of all parts, by the index of the unit that reads them.

    None if a parameter is read by several units.
    """
    parts = [call.module for group in groups for call in group]
    held = {id(param) for part in parts for param in part.parameters()}
    readers = defaultdict(set)
    for time in path:
        unit = next((i for i, g in enumerate(groups) if time < g[-1].stop), len(groups))
        for tensor in trace.read_by([time]):
            readers[tensor].add(unit)
    owners = {}
    for name, param in backbone.named_parameters():
        if id(param) in held or not (units := readers[id(param)]):
            continue
        if len(units) > 1:
            return None
        (owners[name],) = units
    return owners


def _hands_on(call: Call, following: Call) -> bool:
    """Whether a block takes what the one before it returned, as it is."""
    return following.input is call.tensor


def _is_of_maps(group: Sequence[Call], gaps: bool, kind: AsMap) -> bool:
    """Whether each block takes a map, and nothing else, and returns one."""
    return kind is same_map and not gaps and all(len(call.args) == 1 for call in group)


def _stages(widths: Sequence[int], ends: Sequence[bool]) -> list[int]:
    """The stage of each unit, -1 for a stem; ``ends`` lacks that of the last unit."""
    count = len(widths)
    if not any(ends):
        falls = zip(widths[1:], widths[2:], strict=False)
        ends = [False, *(here > after for here, after in falls)]
    if not any(ends):
        return [index * _STAGES // count for index in range(count)]
    stages = list(accumulate(ends[: count - 1], initial=0))
    return stages if ends and ends[0] else [-1, *stages[1:]]
