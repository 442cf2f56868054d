"""Hooks by which a local step follows the forward pass of a network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor, nn

from .between import Branch
from .micro_batches import Maps
from .partition import LocalModule, Unit, branches
from .returned import tensor_of, with_tensor


class CutHooks:
    """Ends modules where their last unit has run, and hands on its output detached.

    Where a unit's output has readers behind the cut (a neck, for instance), they get it
    detached as well; see `Branch`.

    Args:
        model: The whole network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._maps: Maps = {}
        self._branches: dict[str, Branch] = {}

    def arm(
        self, module: LocalModule, end: Callable[[Maps], None], stack: ExitStack
    ) -> None:
        """Registers the hooks of one module for a step.

        Args:
            module: The module, which is not the last.
            end: Called when the last unit has run, with the maps ``(N, C, H, W)`` of
                the module by unit name, with their graph.
            stack: What removes the hooks.
        """
        for unit, following in branches(module):
            self._branches[unit.name] = Branch(following.gaps)
            leave, rejoin = self._leave(unit), self._rejoin(unit)
            start = self._model.get_submodule(following.parts[0])
            stack.callback(self._submodule(unit).register_forward_hook(leave).remove)
            hook = start.register_forward_pre_hook(rejoin, prepend=True)
            stack.callback(hook.remove)
        last = module.units[-1]

        def cut(_submodule: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self._keep_map(last, args, output)
            return self.cut(end, output)

        stack.callback(self._submodule(last).register_forward_hook(cut).remove)

    def cut(self, end: Callable[[Maps], None], output: Tensor) -> Tensor:
        """Ends a module: what the network goes on with, from its output."""
        end(self._maps)
        self._maps.clear()
        return with_tensor(output, tensor_of(output).detach())

    def clear(self) -> None:
        """Ends a step: nothing of its batch is kept."""
        self._maps.clear()
        for branch in self._branches.values():
            branch.forget()
        self._branches.clear()

    def _submodule(self, unit: Unit) -> nn.Module:
        return self._model.get_submodule(unit.name)

    def _leave(self, unit: Unit):
        def hook(_submodule: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self._keep_map(unit, args, output)
            x = self._branches[unit.name].leave(tensor_of(output))
            return with_tensor(output, x)

        return hook

    def _rejoin(self, unit: Unit):
        def hook(_submodule: nn.Module, args: tuple) -> tuple:
            return self._branches[unit.name].rejoin(args[0]), *args[1:]

        return hook

    def _keep_map(self, unit: Unit, args: tuple, output: Tensor) -> None:
        is_tensor = isinstance(tensor_of(output), Tensor)
        self._maps[unit.name] = unit.map_of(output, args) if is_tensor else output
