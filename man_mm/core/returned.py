"""What submodules return: a tensor, or a tensor in front of its height and width."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def tensor_of(output: Any) -> Any:
    """The tensor of an output; the output itself if it has none, or several.

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
    is_tensor = [isinstance(x, Tensor) for x in output] if type(output) is tuple else []
    return len(is_tensor) > 1 and is_tensor[0] and not any(is_tensor[1:])
