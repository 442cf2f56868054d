"""Where a network enters its first unit, and what is in front of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Entry:
    """Cuts the first module off from what is in front of it, and joins both gradients.

    What is in front is back-propagated once, with the network's own loss, which
    reaches it through a global skip. It gets the exact sum of the gradients of this
    loss and of the first module's. The latter is left out if it is not finite: no
    other module may be skipped for its sake.

    Args:
        model: The whole network.
        first: Name of its first unit.

    Attributes:
        rescale: Brings the first module's gradient at the entry to the scale of the
            network's own loss, where local losses have another one. Default: leaves it
            as it is.
    """

    def __init__(self, model: nn.Module, first: str) -> None:
        self._model = model
        self._first = first
        self.rescale: Callable[[Tensor], Tensor] = lambda grad: grad
        self._unreached: set[nn.Parameter] = set()

    def clear(self) -> None:
        """Forgets the latest step."""
        self._unreached = set()

    def detach(self, x: Tensor) -> Tensor:
        """Returns what the first module gets in place of ``x``.

        Args:
            x: Input of the first unit, ``(N, C, H, W)``.
        """
        if not x.requires_grad:
            return x
        self._unreached = _params_behind(x)
        leaf = x.detach().requires_grad_()
        leaf.register_hook(self._admit)
        x.register_hook(lambda grad: self._join(grad, leaf.grad))
        return leaf

    def check(self) -> None:
        """Checks that what is in front is trained, once the loss is back-propagated.

        Raises:
            RuntimeError: If it has parameters that no gradient has reached; names
                them.
        """
        params = self._model.named_parameters()
        names = [name for name, param in params if param in self._unreached]
        if names:
            raise RuntimeError(
                f'{", ".join(names)}: in front of the first unit, {self._first!r}, '
                'and no skip connection brings a gradient: this would never learn. '
                'Freeze it, or make it a part of the first unit in the adapter of the '
                'backbone (man_mm.backbones.register_units).'
            )

    def _admit(self, grad: Tensor) -> Tensor:
        return torch.where(grad.isfinite().all(), self.rescale(grad), 0)

    def _join(self, grad: Tensor, local: Tensor | None) -> Tensor:
        self._unreached = set()
        return grad if local is None else grad + local


def _params_behind(x: Tensor) -> set[nn.Parameter]:
    """The parameters that ``x`` was computed from."""
    params, seen, nodes = set(), set(), [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            params.add(node.variable)
        nodes.extend(before for before, _ in node.next_functions)
    return params
