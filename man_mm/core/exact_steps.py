"""Exact and joint steps: back-propagation end to end, a module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .balance import BALANCED, balanced
from .between import Between
from .checkpointing import check_cut
from .front import Front
from .gradient_relay import caught, injected
from .learner import LocalLearner
from .local_losses import ENTRY, Backward, default_backward, readers
from .micro_batches import Maps
from .partition import LocalModule, outlets
from .patches import Forward, patched
from .returned import tensor_of, with_tensor
from .second_runs import SecondRun


class ExactSteps:
    """Trains the modules of a learner by the network's own loss, in its memory.

    In `step`, modules run without a graph and keep what enters them, the boundaries.
    The network's own loss is then back-propagated by the caller: neck and heads
    learn, and what they read of the backbone gets its gradients. `replay` runs the
    modules again, from the last to the first, each with a graph that is
    back-propagated with the gradient of its output, and gone before the module before
    it runs. The gradients equal those of plain back-propagation, bit for bit where
    the network's operations do.

    With a ``weight``, steps are *joint*: when a module runs again, its auxiliary head
    runs too, and the gradient is that of the network's own loss plus the weighted
    local losses. This is deep supervision (arXiv 1409.5185) without its memory.
    Balanced steps need no weight: see `man_mm.core.balance.balanced`.

    What the last module saves is needed at once, when the network's own loss has been
    back-propagated. It need not be computed again where nothing large comes in between,
    as in a classifier; behind a detector's last module are neck and heads.

    Args:
        learner: The learner whose modules, heads, bank, patches and micro-batches
            are used.
        weight: Weight of the local losses. ``'balanced'`` finds one for each step and
            module: local gradients are, at each of the K - 1 cuts, 1 / (K - 1) as
            large as what arrives there from behind. Defaults to 0: an exact step.
        recompute_last: Whether the last module runs twice, too. If not, the backward
            pass of the network's own loss goes through it, and `replay` begins with
            the module before. Defaults to True.

    Attributes:
        under_way: The module that runs, or ran last.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from man_mm.core import ExactSteps, LocalLearner, Unit, split
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> modules = split(model, [Unit('0'), Unit('1')], cuts=['0'])
        >>> steps = ExactSteps(LocalLearner(model, modules, heads=[nn.Identity()]))
        >>> with steps.step():
        ...     loss = model(torch.rand(3, 4)).square().mean()
        >>> loss.backward()  # behind the modules
        >>> steps.replay()  # the modules, from the last to the first
        >>> all(param.grad is not None for param in model.parameters())
        True
    """

    def __init__(
        self,
        learner: LocalLearner,
        weight: float | str = 0.0,
        recompute_last: bool = True,
    ) -> None:
        self.learner = learner
        self.weight = weight
        self.recompute_last = recompute_last
        self._factor = 1.0 if weight == BALANCED else weight
        self.under_way = learner.modules[0]
        self._runs: list[SecondRun] = []
        self._order: Iterator[tuple[SecondRun, str]] = iter(())
        self._next: tuple[SecondRun, str] | None = None
        self._last_input: Tensor | None = None
        self._grads: dict[str, Tensor] = {}
        self._local: dict[str, list[Tensor]] = {}
        self._frozen: Maps = {}
        self._front: Front | None = None
        self._gap: Between | None = None

    @property
    def completes_last(self) -> bool:
        """Whether the network's own loss gives the last module all its gradients."""
        front, last = self._front, self.learner.modules[-1]
        return not self.recompute_last and (front is None or front.owner is not last)

    @contextmanager
    def step(self, targets: Any = None) -> Iterator[None]:
        """Runs the modules without a graph, for the network's forward pass.

        Args:
            targets: Passed to the auxiliary heads, by `replay`.

        Raises:
            RuntimeError: If not every module runs, in order and with gradients.
        """
        learner = self.learner
        self.forget()
        learner.start(targets)
        size = learner.micro_batch_size
        again = learner.modules if self.recompute_last else learner.modules[:-1]
        self._runs = [SecondRun(learner.model, module, size) for module in again]
        self._order = ((run, part) for run in self._runs for part in run.parts)
        self._next = next(self._order, None)
        try:
            with learner.lean(), ExitStack() as stack:
                if self.weight:
                    self._watch_frozen(stack)
                for run in self._runs:
                    for part in run.parts:
                        self._arm(run, part, stack)
                yield
            if self._next is not None:
                raise RuntimeError(
                    f'The forward pass never ran {self._next[1]!r} in its turn: the '
                    'network has no single path there.'
                )
        except BaseException:
            self.forget()
            raise

    def replay(self, backward: Backward | None = None) -> None:
        """Back-propagates the modules, after the network's own loss was.

        Args:
            backward: Called with a loss, its module, and whether the module's
                gradients are complete with it, to back-propagate and, if wanted, to
                update the module. The loss is the weighted local loss, if any, and
                also sends the gradients of the module's outputs. Defaults to
                ``loss.backward()``.

        Raises:
            RuntimeError: If what entered a module was changed in place since.
        """
        backward = backward or default_backward
        try:
            with self.learner.lean():
                if self._last_input is not None and self._is_early(self._runs[-1]):
                    self._replay_head(self._runs[-1], backward)
                self._last_input = None
                while self._runs:
                    self._replay(self._runs[-1], backward)
                    self._runs.pop()
                if self._front is not None:
                    self._front.backward(self._grads.pop(ENTRY), backward)
        finally:
            self.forget()

    def forget(self) -> None:
        """Ends a step, replayed or not."""
        if self._gap is not None:
            self._gap.stop()
            self._gap = None
        self._runs = []
        self._next = None
        self._front = None
        self._last_input = None
        self._grads = {}
        self._local = {}
        self._frozen = {}
        self.learner.forget()

    def _watch_frozen(self, stack: ExitStack) -> None:
        """Keeps for the heads what enters the first unit, and what is not replayed."""
        learner, run = self.learner, self._runs[0]
        first = learner.model.get_submodule(run.module.parts[0])

        def enter(_submodule: nn.Module, args: tuple) -> None:
            learner.remember_entry(args[0])

        hook = first.register_forward_pre_hook(enter, prepend=True)
        stack.callback(hook.remove)
        for unit in run.module.units:
            if unit.name in outlets(run.module) and unit.name not in run.ends:

                def keep(_m: nn.Module, args: tuple, output: Tensor, unit=unit) -> None:
                    map_ = unit.map_of(output, args).detach()
                    self._frozen[unit.name] = map_
                    learner.remember(run.module, {unit.name: map_})

                end = learner.model.get_submodule(unit.name)
                stack.callback(end.register_forward_hook(keep).remove)

    def _arm(self, run: SecondRun, part: str, stack: ExitStack) -> None:
        submodule = self.learner.model.get_submodule(part)

        def is_due() -> bool:
            return self._next == (run, part)  # not so where an activation is used again

        def enter(_submodule: nn.Module, args: tuple) -> None:
            if is_due():
                self._enter(run, part, args[0])

        def wrap(forward: Forward) -> Forward:
            def call(*args: Any, **kwargs: Any) -> Any:
                first = partial(run.first, forward) if is_due() else forward
                return first(*args, **kwargs)

            return call

        def leave(_submodule: nn.Module, _args: tuple, output: Any) -> Any:
            return self._leave(run, part, output) if is_due() else output

        # Around other tools' hooks, which so see the run without a graph that it is:
        # those of FSDP would wait for a backward pass, and hand on another tensor.
        hook = submodule.register_forward_pre_hook(enter, prepend=True)
        stack.callback(hook.remove)
        stack.enter_context(patched(submodule, wrap))
        stack.callback(submodule.register_forward_hook(leave).remove)

    def _enter(self, run: SecondRun, part: str, x: Tensor) -> None:
        self.under_way = run.module
        gap, self._gap = self._gap, None
        if gap is not None:
            gap.stop(x)
        if run is self._runs[0] and part == run.parts[0] and x.requires_grad:
            self._front = Front(x, self._front_owner(), self._grads)
        run.enter(gap, x)

    def _leave(self, run: SecondRun, part: str, output: Any) -> Any:
        self._next = next(self._order, None)
        if self._next is None:
            self.under_way = self.learner.modules[-1]
        if part in run.ends:
            x = tensor_of(output)
            check_cut(part, x)
            if self.learner.observer is not None:
                self.learner.observer.passed_on(run.module, {part: x})
            if self.weight and not run.module.is_last:
                self.learner.remember(run.module, {part: run.as_map(part, x)})
                if self._next is None:  # only the last module is left, and runs once
                    self._last_input = x.detach()
            output = with_tensor(output, caught(x, part, self._grads))
        self._expect_gap(output)
        return output

    def _expect_gap(self, output: Any) -> None:
        """Records what the network computes in front of the next part, if anything."""
        if self._next is not None and self._next[0].has_gap(self._next[1]):
            self._gap = Between(tensor_of(output))
            self._gap.start()

    def _front_owner(self) -> LocalModule:
        first, last = self.learner.modules[0], self.learner.modules[-1]
        return first if first.units[0].params else last

    def _replay(self, run: SecondRun, backward: Backward) -> None:
        module, front, modules = run.module, self._front, self.learner.modules
        self.under_way = module
        entry = modules[module.index - 1].cut if module.index else ENTRY
        names = [name for name in (*run.ends, entry) if name in self._grads]
        grads = [self._grads.pop(name) for name in names]
        entered: list[Tensor | None] = []
        before = self._runs[-2] if len(self._runs) > 1 else None
        is_early = before is not None and self._is_early(before)
        for index, images in enumerate(run.slices):
            x = run.x[images].detach()
            x.requires_grad_(module.index > 0 or front is not None)
            outputs = run.again(index, x)
            loss = injected(
                [{**outputs, entry: x}[name] for name in names],
                [grad[images] for grad in grads],
            )
            if self.weight and not module.is_last:
                if len(losses := self._local.setdefault(module.name, [])) > index:
                    local = losses[index]  # back-propagated before
                else:
                    grad = grads[names.index(module.cut)][images]
                    local = self._local_loss(run, outputs, images, grad)
                    del grad
                loss = loss + self._factor * local
                del local
            del outputs
            is_whole = images.stop == len(run.x)
            if is_whole:
                grads.clear()  # the backward pass frees each once it is used
            waits = front is not None and front.owner is module
            complete = is_whole and not waits
            self.learner.back_propagate(loss, module, backward, complete)
            del loss  # before the next slice needs the memory
            if is_early:
                self._run_head(before, x, images, backward)
                self.under_way = module
            entered.append(x.grad)
        if losses := self._local.get(module.name):
            self.learner.losses[module.name] = sum(losses)
        if entered[0] is not None:
            whole = entered[0] if len(entered) == 1 else torch.cat(entered)
            self._grads[entry] = whole

    def _is_early(self, run: SecondRun) -> bool:
        """Whether a module's head runs when what is behind has been back-propagated.

        A head that reads nothing of its module but the boundary need not wait until
        the module has run again, and is saving activations.
        """
        return bool(self.weight) and run.ends == [run.module.cut]

    def _run_head(
        self, run: SecondRun, x: Tensor, images: slice, backward: Backward
    ) -> None:
        """Adds to the gradient of a boundary, a leaf, what a module's head sends."""
        self.under_way = run.module
        local = self._local_loss(run, {run.module.cut: x}, images, x.grad)
        backward(self._factor * local, run.module, False)

    def _replay_head(self, run: SecondRun, backward: Backward) -> None:
        """Runs a module's head on what the last module read when it ran."""
        x = self._last_input.requires_grad_()
        x.grad = self._grads.pop(run.module.cut)
        self._run_head(run, x, slice(0, len(x)), backward)
        self._grads[run.module.cut] = x.grad

    def _local_loss(
        self, run: SecondRun, outputs: Maps, images: slice, grad: Tensor
    ) -> Tensor:
        learner, index, count = self.learner, run.module.index, len(run.x)
        if run.size is None:
            images = None
        own = {name: run.as_map(name, output) for name, output in outputs.items()}
        if self.weight == BALANCED:
            # One by one they are small, all heads together as large as the rest.
            share = 1 / len(learner.heads)
            own = balanced(own, run.module.cut, grad, share)
        if index == 0:
            frozen = self._frozen
            if images is not None:
                frozen = {name: map_[images] for name, map_ in frozen.items()}
            own = {**frozen, **own}
        earlier: Maps = {}
        if learner.bank is not None:
            behind = [name for m in learner.modules[index:] for name in outlets(m)]
            learner.bank.keep(set(learner.bank).difference(behind))
            earlier = {
                name: map_
                for name, map_ in learner.bank.items()
                if readers(learner.heads, name, index - 1)
            }
        loss = learner.local_loss(run.module, own, earlier, images, count)
        self._local.setdefault(run.module.name, []).append(loss.detach())
        return loss
