"""A stand-in for a tensor that another process has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor


class MissingOutput(Tensor):
    """What a part returns that ran in another process and whose output was not sent.

    A network may pass it around, but reading it, even just its shape, is an error: the
    network would compute something else than in one process.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> NoReturn:
        raise RuntimeError(
            f'{getattr(func, "__qualname__", func)} needs a map that only an earlier '
            'rank of the pipeline has. If a neck or a skip connection reads it, add '
            "the name of the unit that outputs it to the pipeline's `reads`. A network "
            'that computes something between the parts of one unit, or between units, '
            'outside of submodules, needs units that cover it.'
        )


def missing_output() -> MissingOutput:
    """A new stand-in for such an output."""
    return torch.empty(0).as_subclass(MissingOutput)
