"""Convolution and frozen batch norm as one operation that saves its input only."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .patches import Wrap


def fold_norms(unit: nn.Module) -> Wrap | None:
    """Wraps the forward of a unit so that frozen batch norms save no map.

    A norm in evaluation mode is folded into the weights of its convolution (*tune
    mode*, arXiv 2305.11624), so the map between the two is never made. Unlike with
    mmengine's ``efficient_conv_bn_eval``, the folded weights are not saved either but
    folded again in the backward pass. Equal to the unit up to rounding; norms
    in training mode run as they are. Hooks inside the unit do not run.

    Args:
        unit: A module whose forward function ``torch.fx`` can trace.

    Returns:
        None if the unit has no convolution with a batch norm, or cannot be traced.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from man_mm.core.conv_bn import fold_norms
        >>> from man_mm.core.patches import patched
        >>> unit = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> before = unit(images)
        >>> with patched(unit, fold_norms(unit)):
        ...     torch.allclose(unit(images), before, atol=1e-5)
        True
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(unit)
    except Exception:  # a forward function may do with a proxy what it likes
        return None
    pairs = 0
    for node in list(graph.nodes):
        if pair := _pair(unit, node):
            with graph.inserting_before(node):
                norm = graph.get_attr(node.target)
                conv = graph.get_attr(pair.target)
                both = graph.call_function(conv_bn, (norm, conv, pair.args[0]))
            node.replace_all_uses_with(both)
            graph.erase_node(node)
            graph.erase_node(pair)
            pairs += 1
    folded = torch.fx.GraphModule(unit, graph).forward
    return (lambda _forward: folded) if pairs else None


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, _name: str) -> bool:
        # Anything without norms stays as it is, drop path and its like included.
        return isinstance(m, _BatchNorm) or not any(
            isinstance(child, _BatchNorm) for child in m.modules()
        )


def _pair(unit: nn.Module, node: torch.fx.Node) -> torch.fx.Node | None:
    """The convolution before a batch norm, if nobody else reads its output."""
    if node.op != 'call_module' or not isinstance(node.args[0], torch.fx.Node):
        return None
    before = node.args[0]
    fits = (
        isinstance(unit.get_submodule(node.target), _BatchNorm)
        and before.op == 'call_module'
        and len(before.users) == 1
        and _foldable(unit.get_submodule(before.target))
    )
    return before if fits else None


def _foldable(conv: nn.Module) -> bool:
    return (
        type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
    )


def conv_bn(norm: _BatchNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """Applies a convolution and the batch norm that follows it; see `fold_norms`.

    Args:
        norm: The batch norm.
        conv: The convolution, zero-padded.
        x: Its input ``(N, C, ...)``.
    """
    if norm.training or norm.running_mean is None:
        return norm(conv(x))
    return _ConvBN.apply(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        (norm.running_var + norm.eps).rsqrt(),
        (conv.stride, conv.padding, conv.dilation, conv.groups),
    )


class _ConvBN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, mean, inv_std, rest):
        ctx.save_for_backward(x, weight, bias, gamma, mean, inv_std)
        ctx.rest = rest
        scale = inv_std if gamma is None else gamma * inv_std
        shift = (-mean if bias is None else bias - mean) * scale
        shift = shift if beta is None else shift + beta
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return conv(x, weight * _like(scale, weight), shift, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, gamma, mean, inv_std = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.rest
        need_x, need_weight, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
        scale = inv_std if gamma is None else gamma * inv_std
        grad_x, grad_folded, grad_shift = torch.ops.aten.convolution_backward(
            grad,
            x.to(grad.dtype),  # under autocast, the convolution ran in another dtype
            (weight * _like(scale, weight)).to(grad.dtype),
            [len(weight)],
            *(stride, padding, dilation, False, [0] * len(stride), groups),
            [need_x, need_weight or need_gamma, need_bias or need_gamma or need_beta],
        )
        grads = [None if grad_x is None else grad_x.to(x.dtype), *[None] * 4]
        if grad_shift is not None:
            grad_shift = grad_shift.to(scale.dtype)
        if need_gamma:
            offset = -mean if bias is None else bias - mean
            products = (grad_folded * weight).flatten(1).sum(1, dtype=scale.dtype)
            grads[3] = (products + grad_shift * offset) * inv_std
        if need_weight:
            grads[1] = grad_folded.to(weight.dtype).mul_(_like(scale, weight))
        if need_bias:
            grads[2] = grad_shift * scale
        if need_beta:
            grads[4] = grad_shift
        return (*grads, None, None, None)


def _like(scale: Tensor, weight: Tensor) -> Tensor:
    """A vector ``(C,)`` that multiplies the output channels of a weight."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))
