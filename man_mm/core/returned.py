"""What submodules return: a tensor, or a tensor in front of its height and width."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a value, however nested.

    Args:
        value: What was returned, or handed over.
    """
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def tensor_of(output: Any) -> Any:
    """The tensor of an output; the output itself if it is neither of both.

    Args:
        output: What a submodule returned.

    Examples:
        >>> import torch
        >>> tokens = torch.zeros(1, 6, 4)
        >>> tensor_of((tokens, (2, 3))) is tensor_of(tokens) is tokens
        True
    """
    return output[0] if _has_sizes(output) else output


def sizes_of(output: Any) -> tuple:
    """What an output has behind its tensor.

    Args:
        output: What a submodule returned.
    """
    return output[1:] if _has_sizes(output) else ()


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """An output with another tensor in place of its own.

    Args:
        output: What a submodule returned.
        tensor: The other tensor.
    """
    return (tensor, *output[1:]) if _has_sizes(output) else tensor


def _has_sizes(output: Any) -> bool:
    if type(output) is not tuple or len(output) < 2:
        return False
    tensor, *sizes = output
    return isinstance(tensor, Tensor) and all(map(_is_size, sizes))


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(x) is int for x in value)
