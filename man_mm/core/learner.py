"""LocalLearner: runs the backward pass of a module right after its forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .bank import MemoryBank
from .checkpointing import check_cut, checkpoints_itself, recomputed, require_grad
from .compressed_activations import CompressedActivations
from .cut_hooks import CutHooks
from .entry import Entry
from .local_losses import (
    ENTRY,
    Backward,
    default_backward,
    local_loss,
    readers,
    reads_entry,
    remember,
)
from .micro_batches import (
    Chain,
    Maps,
    MicroBatches,
    check_size,
    join_slices,
    slices_of,
    write_slices,
)
from .observer import Observer
from .partition import LocalModule, outlets
from .patches import Wrap, patched


class LocalLearner:
    """Trains the modules of a network by local losses, without changing the network.

    Inside `step`, forward hooks sit on the cuts. When the last unit of a module has
    run, the module's auxiliary head turns its output into a loss, the loss is
    back-propagated through head and module, and the next module receives the
    detached output (the *boundary*). The last module has no head: the caller
    back-propagates the network's own loss, which stops at the last boundary.

    A network with a global skip has layers in front of its first unit, whose output
    both the first module and the last one read. They get the exact sum of both
    gradients, in the backward pass of the network's own loss; see `Entry`.

    With ``micro_batch_size``, forward and backward of a module run on some images at
    a time, between boundaries that stay whole: activations no longer grow with the
    batch. Local losses are averaged with the images as weights. That is exact for
    losses that are means over images, and without batch norm in training mode, which
    sees a micro-batch at a time. The last module's loss needs the whole batch, so its
    units are recomputed in the backward pass, micro-batch by micro-batch.

    Args:
        model: The whole network.
        modules: Its K modules, from `man_mm.core.split`.
        heads: K - 1 auxiliary heads, or none, with which only exact steps train. Each
            is called as ``head(maps, targets, bank)``: ``maps`` holds by unit name the
            feature maps ``(N, C, H, W)`` that the head may read, those of its own
            module with their graph and, if there is a bank, those of earlier modules
            detached. It returns a loss or a dictionary in which every key that contains
            ``loss`` is a term. Two attributes save memory: ``reads``, the names of all
            earlier maps that it looks up (others may be freed), and
            ``reads_averages``, if averages ``(N, C, 1, 1)`` of these will do. What
            enters the first unit is in the bank if ``reads`` names it, as ``'entry'``.
            Heads that copy weights of the network have a method ``follow(model)``,
            called before the first step and, after each `updated`, before the next one.
        bank: Memory bank, or None for heads that see their own module only.
        patches: Submodules of network or heads, each with a wrapper for its forward
            function that is in place during a step only.
        micro_batch_size: Images that run through a module at a time. Defaults to all.
        compressed: How activations are saved. Defaults to None: as they are.

    Attributes:
        active: The modules that `step` trains, in order. Defaults to all of them.
        targets: What the heads get as ``targets``; `step` sets it, and it may be
            replaced while the model runs.
        entry: Where the network enters its first unit.
        losses: Detached local losses of the latest step, by module name.
        bank_bytes: Most bytes that the bank held in the latest step.
        observer: Told when a module has ended; the bank has its own. Defaults to None.

    Raises:
        ValueError: If the numbers of modules and heads do not match, or for
            ``micro_batch_size`` less than 1 or units that take more than maps.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy
        >>> from man_mm.core import LocalLearner, Unit, split
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.classifier = nn.Linear(8, 2)
        ...
        ...     def forward(self, maps, targets, bank):
        ...         return cross_entropy(self.classifier(maps['0']), targets)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> modules = split(model, [Unit('0'), Unit('1')], cuts=['0'])
        >>> learner = LocalLearner(model, modules, heads=[Head()])
        >>> inputs, targets = torch.rand(3, 4), torch.tensor([0, 1, 1])
        >>> with learner.step(targets):  # back-propagates module 1
        ...     loss = cross_entropy(model(inputs), targets)
        >>> loss.backward()  # back-propagates module 2
        >>> all(param.grad is not None for param in model.parameters())
        True
        >>> list(learner.losses)
        ['module1']
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[LocalModule],
        heads: Sequence[nn.Module],
        bank: MemoryBank | None = None,
        patches: Sequence[tuple[nn.Module, Wrap]] = (),
        micro_batch_size: int | None = None,
        compressed: CompressedActivations | None = None,
    ) -> None:
        if len(heads) not in (0, len(modules) - 1):
            raise ValueError(
                f'{len(modules)} modules need {len(modules) - 1} auxiliary heads, '
                f'one for each but the last; got {len(heads)}.'
            )
        if micro_batch_size is not None:
            check_size(micro_batch_size, modules)
        self.model = model
        self.modules = tuple(modules)
        self.active = self.modules
        self.heads = nn.ModuleList(heads)
        self.bank = bank
        self.patches = tuple(patches)
        self.micro_batch_size = micro_batch_size
        self.compressed = compressed
        self.entry = Entry(model, modules[0].units[0].name)
        self.targets: Any = None
        self.losses: dict[str, Tensor] = {}
        self.bank_bytes = 0
        self.observer: Observer | None = None
        self._cuts = CutHooks(model)
        self._shared: dict[int, dict] = {}
        self._is_followed = False

    def updated(self) -> None:
        """Notes that the network's weights were updated after the latest step."""
        self._is_followed = False

    def params(self, module: LocalModule) -> list[nn.Parameter]:
        """Trainable parameters of a module and of its auxiliary head."""
        if module.is_last or not self.heads:
            return list(module.params)
        head = self.heads[module.index]
        return [*module.params, *(p for p in head.parameters() if p.requires_grad)]

    def free_heads(self) -> None:
        """Drops all auxiliary heads and the bank, which exact steps do without."""
        inside = set(self.heads.modules())
        self.patches = tuple(p for p in self.patches if p[0] not in inside)
        del self.heads[:]  # a model wrapper holds the same list
        self.bank = None

    @contextmanager
    def step(
        self, targets: Any = None, backward: Backward | None = None
    ) -> Iterator[None]:
        """Arms the cuts for one training step.

        Args:
            targets: Passed to the auxiliary heads.
            backward: Called with each local loss, its module, and whether the
                module's gradients are complete with it (not so for micro-batches but
                the last), to back-propagate and, if wanted, to update the module.
                Defaults to `default_backward`.

        Raises:
            RuntimeError: If there are no heads, or a cut does not run exactly once, in
                order and with gradients: no local loss would train its module.
        """
        if len(self.heads) < len(self.modules) - 1:
            raise RuntimeError(
                'Local steps need auxiliary heads; exact ones do not: see ExactSteps.'
            )
        self.start(targets)
        with ExitStack() as stack:
            stack.callback(self.forget)
            if len(self.modules) > 1 or self.compressed is not None:
                stack.enter_context(self.lean())
            if len(self.modules) > 1:
                for module in self.active:
                    self._arm(module, backward or default_backward, stack)
            yield
            left = [m.cut for m in self.active[len(self.losses) :] if not m.is_last]
            if left:
                raise RuntimeError(f'The forward pass never ran the cut {left[0]!r}.')

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Puts `patches` and compression in place; `step` and exact steps call it."""
        with ExitStack() as stack:
            for submodule, wrap in self.patches:
                stack.enter_context(patched(submodule, wrap))
            if self.compressed is not None:
                stack.enter_context(self.compressed.saving())
            yield

    def start(self, targets: Any = None) -> None:
        """Begins a step; `step` calls it, and so do exact steps."""
        self.targets = targets
        self.losses = {}
        self.bank_bytes = 0
        self.entry.clear()
        if not self._is_followed:
            for head in self.heads:
                if hasattr(head, 'follow'):
                    head.follow(self.model)
            self._is_followed = True

    def forget(self) -> None:
        """Ends a step: nothing of its batch is kept."""
        self.targets = None
        self._cuts.clear()
        self._shared.clear()
        if self.bank is not None:
            self.bank.clear()

    def _arm(self, module: LocalModule, backward: Backward, stack: ExitStack) -> None:
        parts = {part: self.model.get_submodule(part) for part in module.parts}
        if module.index == 0:
            start = next(iter(parts.values()))
            # In front of other tools' hooks, which may hand on a copy: this one has
            # to see the tensor itself, which a global skip reads too.
            enter = start.register_forward_pre_hook(self._enter, prepend=True)
            stack.callback(enter.remove)
        # The boundary does not require grad, which some blocks ask of their input.
        needs_grad = module.index > 0 and any(map(checkpoints_itself, parts.values()))
        if self.micro_batch_size is not None:
            self._arm_micro_batches(module, parts, backward, needs_grad, stack)
            return
        if not module.is_last:
            self._cuts.arm(module, partial(self._end, module, backward), stack)
        if needs_grad:
            start = next(iter(parts.values()))
            hook = start.register_forward_pre_hook(
                lambda _, args: (require_grad(args[0]), *args[1:])
            )
            stack.callback(hook.remove)

    def _end(self, module: LocalModule, backward: Backward, own: Maps) -> None:
        self._pass_on(module, own, self._train(module, own, backward))

    def _enter(self, _submodule: nn.Module, args: tuple) -> tuple:
        x, *others = args
        self.remember_entry(x)
        return self.entry.detach(x), *others

    def _arm_micro_batches(
        self,
        module: LocalModule,
        parts: dict[str, nn.Module],
        backward: Backward,
        needs_grad: bool,
        stack: ExitStack,
    ) -> None:
        def slices(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
            for images in slices_of(len(x), self.micro_batch_size):
                yield images, require_grad(x[images]) if needs_grad else x[images]

        def train(chain: Chain, x: Tensor) -> Maps:
            whole: Maps = {}
            losses = []
            for images, some in slices(x):
                own = chain(some)
                losses.append(self._train(module, own, backward, images, len(x)))
                write_slices(whole, own, images, len(x))
                del own  # before the next slice needs the memory
            self._pass_on(module, whole, sum(losses))
            return whole

        def recompute(chain: Chain, x: Tensor) -> Maps:
            run = recomputed(*parts.values())(chain)
            return join_slices([run(some) for _, some in slices(x)])

        run = recompute if module.is_last else train
        micro_batches = MicroBatches(list(parts), outlets(module), run)
        for name, part in parts.items():
            stack.enter_context(patched(part, partial(micro_batches.wrap, name)))

    def _train(
        self,
        module: LocalModule,
        own: Maps,
        backward: Backward,
        images: slice | None = None,
        count: int = 0,
    ) -> Tensor:
        """Back-propagates the local loss of some of ``count`` images, None for all."""
        self._check(module, own[module.cut])
        loss = self.local_loss(module, own, dict(self.bank or {}), images, count)
        self.back_propagate(
            loss, module, backward, images is None or images.stop == count
        )
        return loss.detach()

    def back_propagate(
        self, loss: Tensor, module: LocalModule, backward: Backward, complete: bool
    ) -> None:
        """Calls ``backward``, when what compression need not keep is freed."""
        if self.compressed is not None:
            self.compressed.drop_needless_codes()
        backward(loss, module, complete)

    def local_loss(
        self,
        module: LocalModule,
        own: Maps,
        earlier: Maps,
        images: slice | None = None,
        count: int = 0,
    ) -> Tensor:
        """The loss of a module's head in this step; see `local_losses.local_loss`."""
        if self.bank is not None:
            first = 0 if images is None else images.start
            self.bank.shared = self._shared.setdefault(first, {})
        head = self.heads[module.index]
        return local_loss(head, own, earlier, self.targets, self.bank, images, count)

    def _pass_on(self, module: LocalModule, own: Maps, loss: Tensor) -> None:
        """Ends a module: the bank keeps what later heads read."""
        self.losses[module.name] = loss
        if self.bank is not None:
            index = module.index
            self.bank.keep([n for n in self.bank if readers(self.heads, n, index)])
            self.remember(module, own)
        if self.observer is not None:
            self.observer.passed_on(module, own)

    def remember(self, module: LocalModule, own: Maps) -> None:
        """Adds what later heads read of a module to the bank, if there is one."""
        if self.bank is not None:
            remember(self.bank, self.heads, module, own)
            self.bank_bytes = max(self.bank_bytes, self.bank.nbytes)

    def remember_entry(self, x: Tensor) -> None:
        """Adds what enters the first unit to the bank, if a head reads it."""
        if self.bank is not None and reads_entry(self.heads):
            self.bank.store(ENTRY, x)

    def _check(self, module: LocalModule, output: Any) -> None:
        if len(self.losses) != module.index - self.active[0].index:
            raise RuntimeError(
                f'The cut {module.cut!r} ran out of turn or more than once in a step: '
                'the network has no single path there.'
            )
        check_cut(module.cut, output, getattr(output, 'requires_grad', False))
