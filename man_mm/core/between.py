"""What a network computes between two submodules, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .returned import tensors_in


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor that follows from the source."""

    number: int


@dataclass(frozen=True)
class _Operation:
    function: Callable[..., Any]
    args: Any
    made: tuple[int, ...]


class Between(TorchFunctionMode):
    """Records the operations on a tensor from now on, until `stop`.

    Tensors that follow from the source are not kept, so that a recording needs no
    memory but for what else its operations read, such as a class token.

    Args:
        source: What a submodule returned, as the network sees it.

    Attributes:
        source: The same, until it is set to None.

    Examples:
        >>> import torch
        >>> source = torch.arange(3.0)
        >>> between = Between(source)
        >>> between.start()
        >>> entered = 2 * source + 1
        >>> between.stop(entered)
        >>> between.again(torch.ones(3))
        tensor([3., 3., 3.])
    """

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.source: Tensor | None = source
        self._operations: list[_Operation] = []
        self._numbers = {id(source): 0}
        self._kept = [source]  # so that each has an id of its own
        self._entered: int | None = None
        self._runs = False

    def start(self) -> None:
        """Begins to record."""
        self.__enter__()
        self._runs = True

    def stop(self, entered: Tensor | None = None) -> None:
        """Ends it; without effect if it has ended.

        Args:
            entered: What the next submodule takes.
        """
        if self._runs:
            self._runs = False
            self.__exit__(None, None, None)
        self._entered = self._numbers.get(id(entered))
        self._numbers, self._kept = {}, []

    def again(self, source: Tensor) -> Tensor:
        """Repeats the operations.

        Args:
            source: Takes the place of the source.

        Returns:
            What the next submodule takes.

        Raises:
            RuntimeError: If that does not follow from the source by operations of
                PyTorch.
        """
        if self._entered is None:
            raise RuntimeError(
                'What a unit takes does not follow from what the one before it '
                'returned by operations of PyTorch, so the step cannot repeat it: '
                'move the cut, or write an adapter for the backbone '
                '(man_mm.backbones.register_units).'
            )
        values = {0: source}
        for operation in self._operations:
            args, kwargs = tree_map_only(
                _Place, lambda place: values[place.number], operation.args
            )
            result = operation.function(*args, **kwargs)
            values.update(zip(operation.made, tensors_in(result), strict=True))
        return values[self._entered]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = tree_map_only(Tensor, self._place, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        made = tensors_in(result)
        if made and any(isinstance(x, _Place) for x in tree_leaves(given)):
            self._kept += made
            for tensor in made:
                self._numbers.setdefault(id(tensor), len(self._numbers))
            numbers = tuple(self._numbers[id(tensor)] for tensor in made)
            self._operations.append(_Operation(func, given, numbers))
        return result

    def _place(self, tensor: Tensor) -> Tensor | _Place:
        number = self._numbers.get(id(tensor))
        return tensor if number is None else _Place(number)


class Branch:
    """A tensor that the next unit gets with its graph, and all others detached.

    Their graph would be gone when they are back-propagated.

    Args:
        has_gap: Whether the network computes something in front of the next unit.
    """

    def __init__(self, has_gap: bool) -> None:
        self._has_gap = has_gap
        self._output: Tensor | None = None
        self._between: Between | None = None

    def leave(self, output: Tensor) -> Tensor:
        """The output for all readers.

        Args:
            output: What the unit returned, with its graph.
        """
        self._output, detached = output, output.detach()
        if self._has_gap:
            self._between = Between(detached)
            self._between.start()
        return detached

    def rejoin(self, x: Tensor) -> Tensor:
        """What the next unit takes, with its graph.

        Args:
            x: The same without graph.
        """
        output, between = self._output, self._between
        if between is not None:
            between.stop(x)
            output = between.again(output)
        self.forget()
        return output

    def forget(self) -> None:
        """Drops the output, and ends a recording."""
        if self._between is not None:
            self._between.stop()
        self._output = self._between = None
