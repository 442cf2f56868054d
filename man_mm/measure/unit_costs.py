"""What every unit of a network costs in a training step, in bytes."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from man_mm.core.checkpointing import require_grad
from man_mm.core.learner import LocalLearner
from man_mm.core.local_losses import Backward
from man_mm.core.partition import LocalModule, ends_of_stages, outlets
from man_mm.core.patches import Forward
from man_mm.core.second_runs import trainable_parts
from man_mm.core.storages import tensor_bytes

from .memory import StorageTracker
from .memory_split import MemorySplit
from .peaks import UnitCost


def measure_costs(
    learner: LocalLearner,
    step: Callable[[Backward], object],
    device: str | torch.device = 'cpu',
) -> list[UnitCost]:
    """Runs one training step without an update, cut after every unit.

    Such a step needs no more memory than the largest unit. What a module of several
    units needs follows by adding up; see `man_mm.measure.peaks.predict`.

    Args:
        learner: A learner that is cut after every unit. Its weights stay as they are,
            its gradients are dropped, buffers change as in any step.
        step: Runs a training step. It is given the ``backward`` for ``learner.step``,
            which it also has to call for the last module, with the network's own loss.
        device: The device whose bytes count. Defaults to ``'cpu'``.

    Returns:
        One cost for each module of the learner.
    """
    recorder = _Recorder(learner, torch.device(device))
    with ExitStack() as stack:
        for module in learner.modules:
            recorder.watch(module, stack)
        stack.enter_context(_inputs_require_grad(learner))
        with _collector_off(), recorder.timeline:
            step(recorder.backward)
    return recorder.costs()


def measure_modules(
    learner: LocalLearner,
    step: Callable[[], object],
    device: str | torch.device = 'cpu',
) -> list[int]:
    """Peak bytes of every module in a training step, above the step's start.

    Args:
        learner: The learner that the step uses.
        step: Runs one training step, whose optimizer should have its state already.
        device: The device whose bytes count. Defaults to ``'cpu'``.
    """
    timeline, peaks = _Timeline(torch.device(device)), []
    with ExitStack() as stack:
        for module in learner.modules[1:]:
            start = learner.model.get_submodule(module.units[0].parts[0])
            hook = start.register_forward_pre_hook(
                lambda *_: peaks.append(timeline.mark().peak)
            )
            stack.callback(hook.remove)
        with _collector_off(), timeline:
            step()
    return [*peaks, timeline.mark().peak]


class _Mark(NamedTuple):
    """Bytes that are alive, and their peak since the mark before."""

    live: int
    peak: int


class _Timeline(StorageTracker):
    """Live bytes at marks, and their peaks between marks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, MemorySplit())

    def mark(self) -> _Mark:
        self.end_op()
        peak, self.peak = self.peak, self.total
        return _Mark(self.total, peak)


class _Recorder:
    """Marks the phases of every module: start, head, gradient of the output, end."""

    def __init__(self, learner: LocalLearner, device: torch.device) -> None:
        self.learner = learner
        self.timeline = _Timeline(device)
        self.marks: list[list[_Mark]] = [[] for _ in learner.modules]
        self.outputs: list[list[dict[str, int]]] = [[] for _ in learner.modules]
        self.storages: list[weakref.ref] = []
        self.read: list[bool] = []
        self.grads = [0] * len(learner.modules)
        self.banked: list[dict[str, int]] = [{} for _ in learner.modules]
        self.entry = 0  # bytes that enter the first part that trains, if not images

    def watch(self, module: LocalModule, stack: ExitStack) -> None:
        model = self.learner.model
        start = model.get_submodule(module.units[0].parts[0])
        hook = start.register_forward_pre_hook(partial(self._start, module.index))
        stack.callback(hook.remove)
        trained = trainable_parts(model, module)[0]
        if module.index == 0 and trained != module.parts[0]:
            hook = model.get_submodule(trained).register_forward_pre_hook(self._enter)
            stack.callback(hook.remove)
        end = model.get_submodule(module.cut)
        hook = end.register_forward_hook(partial(self._end, module))
        stack.callback(hook.remove)
        if not module.is_last:
            head = self.learner.heads[module.index]
            hook = head.register_forward_pre_hook(
                lambda _head, args: self._head(module, args[0])
            )
            stack.callback(hook.remove)

    def backward(self, loss: Tensor, module: LocalModule, complete: bool) -> None:
        self.read = [storage() is not None for storage in self.storages]
        loss.backward()
        self.marks[module.index].append(self.timeline.mark())
        self.grads[module.index] = tensor_bytes(
            [
                param.grad
                for unit in module.units
                for part in unit.parts
                for param in self.learner.model.get_submodule(part).parameters()
            ]
        )
        if complete:
            for param in self.learner.params(module):
                param.grad = None

    def _enter(self, _part: object, args: tuple) -> None:
        self.entry += args[0].nbytes

    def _start(self, index: int, *_: object) -> None:
        self.marks[index].append(self.timeline.mark())
        bank = self.learner.bank or {}
        self.banked[index] = {name: tensor_bytes(bank[name]) for name in bank}

    def _end(
        self, module: LocalModule, _unit: object, _: tuple, output: Tensor
    ) -> None:
        self.storages.append(weakref.ref(output.untyped_storage()))
        if module.is_last:
            self._head(module, {module.cut: output})

    def _head(self, module: LocalModule, maps: Mapping[str, Tensor]) -> None:
        self.marks[module.index].append(self.timeline.mark())
        sizes = {name: maps[name].nbytes for name in outlets(module) if name in maps}
        self.outputs[module.index].append(sizes)
        maps[module.cut].register_hook(
            lambda _grad: self.marks[module.index].append(self.timeline.mark())
        )

    def costs(self) -> list[UnitCost]:
        modules = self.learner.modules
        units = [unit for module in modules for unit in module.units]
        ends = {unit.name for unit, _ in ends_of_stages(units)}
        # Here, the bank has the output of every unit that heads can read. Another
        # partition keeps those of stage ends, and of its own cuts.
        inner = [module.cut for module in modules if module.cut not in ends]
        costs = []
        for module in modules:
            index, cut = module.index, module.cut
            extra = sum(
                self.banked[index].get(name, 0)
                for name in inner
                if index == 0 or name != modules[index - 1].cut
            )
            kept = max([b.get(cut, 0) for b in self.banked[index + 2 :]], default=0)
            phases = self._phases(module)
            is_read = self.read[index] or kept >= phases['output'] > 0
            costs.append(
                UnitCost(
                    names=tuple(unit.name for unit in module.units),
                    held=phases.pop('held') - extra,
                    grads=self.grads[index],
                    ends_stage=cut in ends,
                    shared=cut in ends and is_read,
                    kept=kept if cut in inner else 0,
                    entry=self.entry if index == 0 else 0,
                    **phases,
                )
            )
        return costs

    def _phases(self, module: LocalModule) -> dict[str, int]:
        start, head, gradient, end, *others = self.marks[module.index]
        sizes = self.outputs[module.index]
        output = sizes[0][module.cut]
        phases = dict(
            held=start.live,
            forward=head.peak - start.live,
            saved=head.live - start.live,
            head=gradient.peak - head.live,
            head_grads=gradient.live - head.live - output,
            backward=end.peak - gradient.live,
            output=output,
        )
        if self.learner.micro_batch_size is None or len(self.marks) == 1:
            return phases
        if len(sizes) > 1 and sizes[1] == sizes[0]:
            # The second slice finds gradients of parameters.
            head, gradient, end = others[:3]
            phases['head'] = gradient.peak - head.live
            phases['backward'] = end.peak - gradient.live
        wholes = Counter()
        for size in sizes:
            wholes.update(size)
        phases['whole'] = whole = wholes.pop(module.cut)
        phases['held'] += wholes.total()  # of stages that are frozen
        if module.is_last:  # which runs on slices between boundaries that are whole
            phases['saved'] -= whole
            phases['output'] = 0
        return phases


@contextmanager
def _collector_off() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _inputs_require_grad(learner: LocalLearner) -> Iterator[None]:
    """Lets units compute gradients of their inputs, as units inside a module do."""
    starts = [
        learner.model.get_submodule(module.units[0].parts[0])
        for module in learner.modules[1:]
    ]
    patches = learner.patches
    learner.patches = (*patches, *((start, _require_input_grad) for start in starts))
    try:
        yield
    finally:
        learner.patches = patches


def _require_input_grad(forward: Forward) -> Forward:
    return lambda x, *args: forward(require_grad(x), *args)
