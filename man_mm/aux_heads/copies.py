"""Layers of the model's own kind, with weights of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from mmengine.model import kaiming_init
from torch import nn

from man_mm.backbones import find_units


def unit_parts(model: nn.Module, name: str) -> tuple[str, ...]:
    """Names of the submodules that a unit consists of.

    Args:
        model: The whole model.
        name: Name of the unit.

    Raises:
        ValueError: If the unit takes or returns something else than one map.
    """
    unit = next(unit for unit in find_units(model) if unit.name == name)
    if unit.as_map is not None:
        raise ValueError(
            f'{name!r} works on tokens, and this auxiliary head copies blocks that '
            'work on maps (N, C, H, W): use another optim_wrapper.local_learning.'
            "aux_head, such as dict(type='MANHead')."
        )
    return unit.parts


def chained(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Submodules of a model that run one after another, as one, shared with it.

    Args:
        model: The whole model.
        names: Names of the submodules.
    """
    parts = [model.get_submodule(name) for name in names]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def fresh_copy(model: nn.Module, name: str) -> nn.Module:
    """Copies a unit of a model, trainable and with new initial weights.

    Args:
        model: The whole model.
        name: Name of the unit.

    Raises:
        ValueError: If the unit takes or returns something else than one map.
    """
    unit = chained(model, unit_parts(model, name))
    block = copy.deepcopy(unit).requires_grad_()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            kaiming_init(module)
        elif hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    return block


def fresh_block(model: nn.Module, stage: int, whole: bool) -> nn.Module:
    """Copies the first block of a stage, or its last where the stage has begun.

    The first one brings the stage's stride and width, the last one keeps both.

    Args:
        model: The whole model.
        stage: Index of the stage.
        whole: Whether the stage has not begun.
    """
    units = [unit for unit in find_units(model) if unit.stage == stage]
    return fresh_copy(model, units[0 if whole else -1].name)
