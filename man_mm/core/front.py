"""What runs in front of the modules with a graph, and is back-propagated last."""

from __future__ import annotations

from torch import Tensor

from .gradient_relay import injected
from .local_losses import ENTRY, Backward
from .partition import LocalModule


class Front:
    """Layers in front of the first unit, which others than the first module read.

    They are those in front of the body of a restorer, which a global skip reads
    behind it, and the embeddings of a Vision Transformer.

    Args:
        x: What they hand to the first unit ``(N, ...)``, with its graph. From now on
            it is a leaf for all its readers.
        owner: The module that has their parameters.
        grads: Gets the gradient of the other readers, as `ENTRY`, if there are any.
    """

    def __init__(self, x: Tensor, owner: LocalModule, grads: dict[str, Tensor]) -> None:
        self.owner = owner
        self._sent: list[Tensor] = []
        self._root = injected([x], self._sent)

        def catch(leaf: Tensor) -> None:
            grads[ENTRY], leaf.grad = leaf.grad, None

        if not x._is_view():  # torch cannot detach views so, and no skip reads one
            x.detach_().requires_grad_()
            x.register_post_accumulate_grad_hook(catch)

    def backward(self, grad: Tensor, backward: Backward) -> None:
        """Back-propagates the layers.

        Args:
            grad: The gradient of all readers.
            backward: See `man_mm.core.exact_steps.ExactSteps.replay`.
        """
        self._sent.append(grad)
        backward(self._root, self.owner, True)
