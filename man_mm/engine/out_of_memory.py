"""Reports in which module memory ran out, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mmengine import dist

from man_mm.core import LocalLearner, LocalModule
from man_mm.core.partition import Measure
from man_mm.measure.peaks import predict
from man_mm.measure.planner import format_bytes


@contextmanager
def explains_out_of_memory(
    learner: LocalLearner,
    measure: Measure | None,
    shape: Callable[[], tuple[int, ...] | None],
    under_way: Callable[[], LocalModule],
) -> Iterator[None]:
    """Adds to an out-of-memory error which module was running.

    With several processes nothing is measured: the others are in their step, would not
    take part in what a measurement reduces, and are to learn of the error at once.

    Args:
        learner: The learner whose step runs inside.
        measure: Measures what units cost for images of a shape, once the memory of
            the failed step is free again.
        shape: Gives the shape of the inputs, ``(N, C, H, W)`` for images; ``()`` if
            they are no tensor, and None before the model has got them.
        under_way: Gives the module that was running.

    Raises:
        RuntimeError: Of the error's own type, in its place.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # The maps of the failed step live in the frames of its traceback.
        traceback.clear_frames(error.__traceback__)
        message = _explain(learner, under_way(), measure, shape())
        raise type(error)(f'{message}\n{error}') from None


def _is_out_of_memory(error: Exception) -> bool:
    name, text = type(error).__name__, str(error)
    # The allocator of the CPU has no type of its own.
    return name in ('MemoryError', 'OutOfMemoryError') or 'CPUAllocator' in text


def _explain(
    learner: LocalLearner,
    module: LocalModule,
    measure: Measure | None,
    shape: tuple[int, ...] | None,
) -> str:
    if shape is None:
        return 'Memory ran out before the first module: the batch itself is too large.'
    first, last = module.units[0].name, module.units[-1].name
    lines = [
        f'Memory ran out in {module.name} of {len(learner.modules)} ({first!r} to '
        f'{last!r}), with inputs of shape {shape or "unknown"}.'
    ]
    try:
        peaks = _predict(learner, measure, shape)
    except Exception:  # what fails now must not hide why training failed
        peaks = []
    if peaks:
        lines.append(
            f'Its predicted peak is {format_bytes(peaks[module.index])} above model, '
            f'heads and optimizer; the largest module needs {format_bytes(max(peaks))}.'
        )
    options = f'--batch {shape[0]} ' if shape else ''
    if len(shape) == 4:
        options += f'--size {shape[2]} {shape[3]} '
    lines.append(
        'See what each module needs, and find cuts that need less, with\n'
        f'    mim run man_mm plan_partition CONFIG {options}'
        f'--num-modules {len(learner.modules) + 1}\n'
        'or lower the batch size, or set '
        'optim_wrapper.local_learning.micro_batch_size.'
    )
    return '\n'.join(lines)


def _predict(
    learner: LocalLearner, measure: Measure | None, shape: Sequence[int]
) -> list[int]:
    """Peak bytes of each module; none where they cannot be measured."""
    if measure is None or len(shape) != 4 or dist.get_world_size() > 1:
        return []
    costs = measure(shape)
    ends = [
        1 + next(i for i, cost in enumerate(costs) if module.cut in cost.names)
        for module in learner.modules
    ]
    return [planned.peak for planned in predict(costs, ends).modules]
