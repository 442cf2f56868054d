"""From a model to the units that it can be cut into, and what they output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from man_mm.core import Unit

UnitsFn = Callable[[nn.Module], list[Unit]]

_ADAPTERS: dict[str, UnitsFn] = {}
_SEVERAL_PATHS = ('DetectoRS_ResNet', 'TridentResNet')


@dataclass(frozen=True)
class Tap:
    """A feature map that a unit outputs.

    Attributes:
        name: Name of the unit.
        stage: Index of its stage; -1 for a stem.
        channels: Number of channels C of its map ``(N, C, H, W)``.
        stride: Pixels of the input image to one step on the map.
    """

    name: str
    stage: int
    channels: int
    stride: int


def register_units(*class_names: str) -> Callable[[UnitsFn], UnitsFn]:
    """Registers a function that lists a backbone's units, for backbone classes.

    Classes are known by name, so that a family is supported in every package that
    has it, and none of them must be installed. Subclasses are covered too.
    """

    def register(fn: UnitsFn) -> UnitsFn:
        _ADAPTERS.update(dict.fromkeys(class_names, fn))
        return fn

    return register


def find_units(model: nn.Module) -> list[Unit]:
    """Lists the units of ``model.backbone`` in the order in which they run.

    Args:
        model: A model of mmdet or mmpretrain, or any module with a ``backbone``.

    Returns:
        Units whose names are relative to ``model``.

    Raises:
        ValueError: If the model has no backbone, or one that is not supported.
    """
    backbone = getattr(model, 'backbone', None)
    supported = ', '.join(sorted(_ADAPTERS))
    if backbone is None:
        raise ValueError(
            f'{type(model).__name__} has no backbone to cut. Supported backbones: '
            f'{supported}.'
        )
    names = [cls.__name__ for cls in type(backbone).__mro__]
    if any(name in _SEVERAL_PATHS for name in names):
        raise ValueError(
            f'model.backbone is a {names[0]}, which runs on several paths and cannot '
            f'be cut into modules. Supported backbones: {supported}.'
        )
    for name in names:
        if name in _ADAPTERS:
            return [
                Unit(
                    f'backbone.{unit.name}',
                    unit.stage,
                    tuple(f'backbone.{part}' for part in unit.parts),
                )
                for unit in _ADAPTERS[name](backbone)
            ]
    raise ValueError(
        f'model.backbone is a {names[0]}, which local learning cannot cut yet. '
        f'Supported backbones: {supported}; write an adapter with '
        'man_mm.backbones.register_units to add one.'
    )


@torch.no_grad()
def probe(model: nn.Module, units: Sequence[Unit], size: int = 64) -> list[Tap]:
    """Runs the backbone once on a black image to learn the shape of every unit's map.

    It also proves that the units lie on one path: each one has to run once, and to
    receive exactly the tensor that the one before it returned.

    Args:
        model: Model with a ``backbone``; left as it was, modes and buffers included.
        units: Its units, from `find_units`.
        size: Height and width of the image in pixels.

    Returns:
        One tap a unit.

    Raises:
        ValueError: If the units are not on a single path.
    """
    backbone = model.backbone
    inputs: dict[str, list] = {unit.name: [] for unit in units}
    outputs: dict[str, list] = {unit.name: [] for unit in units}
    handles = []
    for unit in units:

        def record(_m, args, output, name=unit.name):
            inputs[name].append(args[0])
            outputs[name].append(output)

        handles.append(model.get_submodule(unit.name).register_forward_hook(record))
    modes = {module: module.training for module in backbone.modules()}
    first = next(backbone.parameters())
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    try:
        backbone.eval()
        backbone(first.new_zeros(1, next(convs).in_channels, size, size))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training

    previous = None
    for unit in units:
        once = len(outputs[unit.name]) == 1
        chained = previous is None or (once and inputs[unit.name][0] is previous)
        if not (once and chained and isinstance(outputs[unit.name][0], torch.Tensor)):
            raise ValueError(
                f'{type(backbone).__name__} cannot be cut around {unit.name!r}: it is '
                'not on a single path from the image to the output.'
            )
        previous = outputs[unit.name][0]
    shapes = {unit.name: outputs[unit.name][0].shape for unit in units}
    return [
        Tap(unit.name, unit.stage, shapes[unit.name][1], size // shapes[unit.name][3])
        for unit in units
    ]
