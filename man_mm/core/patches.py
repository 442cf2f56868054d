"""Other forward functions for submodules, for as long as a training step lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Wrap = Callable[[Forward], Forward]


@contextmanager
def patched(submodule: nn.Module, wrap: Wrap) -> Iterator[None]:
    """Replaces the forward function of a submodule by ``wrap(forward)``.

    Hooks of the submodule stay, and see the call as before.

    Args:
        submodule: The submodule to patch.
        wrap: Takes its forward function and returns the one to use instead.
    """
    before = vars(submodule).get('forward')  # other tools patch in the same way
    submodule.forward = wrap(submodule.forward)
    try:
        yield
    finally:
        if before is None:
            del submodule.forward
        else:
            submodule.forward = before
