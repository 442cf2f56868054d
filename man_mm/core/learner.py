"""LocalLearner: runs the backward pass of a module right after its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .bank import MemoryBank
from .partition import LocalModule, ends_of_stages

Losses = Tensor | Mapping[str, Any]


class LocalLearner:
    """Trains the modules of a network by local losses, without changing the network.

    Inside `step`, forward hooks sit on the cuts. When the last unit of a module has
    run, the module's auxiliary head turns its output into a loss, the loss is
    back-propagated through head and module, and the next module receives the
    detached output (the *boundary*). The last module has no head: the caller
    back-propagates the network's own loss, which stops at the last boundary.

    Args:
        model: The whole network.
        modules: Its K modules, from `man_mm.core.split`.
        heads: K - 1 auxiliary heads. Each is called as ``head(maps, targets, bank)``:
            ``maps`` holds by unit name the feature maps ``(N, C, H, W)`` that the
            head may read, those of its own module with their graph and, if there
            is a bank, those of earlier modules detached. It returns a loss or a
            dictionary in which every key that contains ``loss`` is a term.
        bank: Memory bank, or None for heads that see their own module only.

    Attributes:
        targets: What the heads get as ``targets``; `step` sets it, and it may be
            replaced while the model runs.
        losses: Detached local losses of the latest step, by module name.
        bank_bytes: Bytes in the bank at the end of the latest step.

    Raises:
        ValueError: If the numbers of modules and heads do not match.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[LocalModule],
        heads: Sequence[nn.Module],
        bank: MemoryBank | None = None,
    ) -> None:
        if len(heads) != len(modules) - 1:
            raise ValueError(
                f'{len(modules)} modules need {len(modules) - 1} auxiliary heads, '
                f'one for each but the last; got {len(heads)}.'
            )
        self.model = model
        self.modules = tuple(modules)
        self.heads = nn.ModuleList(heads)
        self.bank = bank
        self.targets: Any = None
        self.losses: dict[str, Tensor] = {}
        self.bank_bytes = 0
        self._own: dict[str, Tensor] = {}

    def params(self, module: LocalModule) -> list[nn.Parameter]:
        """Trainable parameters of a module and of its auxiliary head."""
        if module.is_last:
            return list(module.params)
        head = self.heads[module.index]
        return [*module.params, *(p for p in head.parameters() if p.requires_grad)]

    @contextmanager
    def step(
        self,
        targets: Any = None,
        backward: Callable[[Tensor, LocalModule], None] | None = None,
    ) -> Iterator[None]:
        """Arms the cuts for one training step.

        Args:
            targets: Passed to the auxiliary heads.
            backward: Called with each local loss and its module, to back-propagate
                and, if wanted, to update the module at once. Defaults to
                ``loss.backward()``.

        Raises:
            RuntimeError: If a cut does not run exactly once, in order and with
                gradients, in which case no local loss would train its module.
        """
        self.targets = targets
        self.losses = {}
        handles = []
        try:
            for module in self.modules[:-1]:
                self._arm(module, backward or _backward, handles)
            yield
            if len(self.losses) < len(self.modules) - 1:
                cut = self.modules[len(self.losses)].cut
                raise RuntimeError(f'The forward pass never ran the cut {cut!r}.')
            if self.bank is not None:
                self.bank_bytes = self.bank.nbytes
        finally:
            for handle in handles:
                handle.remove()
            self.targets = None
            self._own.clear()
            if self.bank is not None:
                self.bank.clear()

    def _arm(self, module: LocalModule, backward, handles: list) -> None:
        for unit, following in ends_of_stages(module.units):
            end = self.model.get_submodule(unit.name)
            start = self.model.get_submodule(following.parts[0])
            handles.append(end.register_forward_hook(self._branch(unit.name)))
            handles.append(start.register_forward_pre_hook(self._rejoin(unit.name)))

        def cut(_submodule: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            return self._cut(module, backward, output)

        end = self.model.get_submodule(module.cut)
        handles.append(end.register_forward_hook(cut))
        following = self.modules[module.index + 1]
        if any(_checkpointed(self.model, part) for part in _parts(following)):
            start = self.model.get_submodule(following.units[0].parts[0])
            handles.append(start.register_forward_pre_hook(_require_grad))

    def _branch(self, name: str):
        # Necks read the end of a stage: they get it detached, since its graph is
        # gone when they are back-propagated. The next unit gets it back with graph.
        def hook(_submodule: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            self._own[name] = output
            return output.detach()

        return hook

    def _rejoin(self, name: str):
        def hook(_submodule: nn.Module, _args: tuple) -> Tensor:
            return self._own[name]

        return hook

    def _cut(self, module: LocalModule, backward, output: Tensor) -> Tensor:
        self._check(module, output)
        self._own[module.cut] = output
        earlier = {} if self.bank is None else self.bank
        maps = {**earlier, **self._own}
        loss = total_loss(self.heads[module.index](maps, self.targets, self.bank))
        backward(loss, module)
        self.losses[module.name] = loss.detach()
        if self.bank is not None:
            for name, map_ in self._own.items():
                self.bank.store(name, map_)
        self._own.clear()
        return output.detach()

    def _check(self, module: LocalModule, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f'The cut {module.cut!r} returns {type(output).__name__}, not one '
                'tensor: cut elsewhere.'
            )
        if len(self.losses) != module.index:
            raise RuntimeError(
                f'The cut {module.cut!r} ran out of turn or more than once in a step: '
                'the network has no single path there.'
            )
        if _in_checkpoint() or not (torch.is_grad_enabled() and output.requires_grad):
            raise RuntimeError(
                f'The cut {module.cut!r} ran without gradients. It may lie inside a '
                'region that is checkpointed or run under no_grad: move the cut to '
                'the end of that region, or leave the region out of '
                'activation_checkpointing.'
            )


def stage_ends(module: LocalModule) -> list[str]:
    """Names of the units whose maps heads may read: stage ends, and the cut."""
    return [*(unit.name for unit, _ in ends_of_stages(module.units)), module.cut]


def total_loss(losses: Losses) -> Tensor:
    """Sums the terms of a dictionary of losses, as ``parse_losses`` of mmengine does.

    Args:
        losses: A scalar tensor, or a dictionary of tensors or lists of tensors;
            keys without ``loss`` are only for the log.
    """
    if isinstance(losses, Tensor):
        return losses
    terms = [value for name, value in losses.items() if 'loss' in name]
    terms = [term if isinstance(term, list | tuple) else [term] for term in terms]
    return sum(value.mean() for term in terms for value in term)


def _backward(loss: Tensor, _module: LocalModule) -> None:
    loss.backward()


def _parts(module: LocalModule) -> list[str]:
    return [part for unit in module.units for part in unit.parts]


def _checkpointed(model: nn.Module, part: str) -> bool:
    return any(
        getattr(m, 'with_cp', False) for m in model.get_submodule(part).modules()
    )


class _RequireGrad(torch.autograd.Function):
    """Hands a tensor on as one that requires grad, and keeps nothing of it."""

    @staticmethod
    def forward(ctx, tensor: Tensor, _source: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, _grad: Tensor) -> tuple[None, None]:
        return None, None


def _require_grad(_submodule: nn.Module, args: tuple) -> tuple:
    # Blocks checkpoint themselves only if their input requires grad. A leaf would
    # stay alive, with a gradient, as long as the loss does.
    source = torch.empty(0, requires_grad=True)
    return tuple(
        _RequireGrad.apply(a, source) if isinstance(a, Tensor) else a for a in args
    )


def _in_checkpoint() -> bool:
    # Inside a non-reentrant region, which would be recomputed without the cut.
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    hooks = top(True) if top else None
    return bool(hooks) and hooks[0].__module__ == 'torch.utils.checkpoint'
