"""From a model to the units that it can be cut into, and what they output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from man_mm.core import Unit
from man_mm.core.local_losses import ENTRY
from man_mm.core.returned import tensor_of

from .discovery import discover_units
from .images import black_image, evaluating, trial_sides

UnitsFn = Callable[[nn.Module], list[Unit]]

ADAPTERS: dict[str, UnitsFn] = {}  # by the name of a backbone class
_LARGE = 256  # pixels of an image that leaves two locations on the coarsest level
_PATHS = 'runs on several paths'
_REFUSED = {  # reasons by the name of a backbone class
    'Conformer': f'{_PATHS}: maps and tokens side by side',
    'DetectoRS_ResNet': f'{_PATHS}: it runs again on what the neck made of its maps',
    'HourglassNet': f'{_PATHS}: a map of each resolution is kept for the way back',
    'HRNet': f'{_PATHS}: maps of all resolutions side by side',
    'RevVisionTransformer': f'{_PATHS}: two streams that are inverted in their own '
    'backward pass',
    'SparseConvNeXt': 'masks its maps by a global variable that only the pre-training '
    'of SparK sets',
    'SparseResNet': 'masks its maps by a global variable that only the pre-training '
    'of SparK sets',
    'TNT': f'{_PATHS}: tokens of patches and of the pixels inside side by side',
    'TridentResNet': f'{_PATHS}: branches of several dilations side by side',
}


@dataclass(frozen=True)
class Tap:
    """A feature map that a unit outputs.

    Attributes:
        name: Name of the unit, or ``'entry'`` for what enters the first one.
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

    Examples:
        >>> from torch import nn
        >>> from man_mm import Unit
        >>> from man_mm.backbones import find_units, register_units
        >>> class TwoLayers(nn.Sequential):
        ...     def __init__(self):
        ...         super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        >>> @register_units('TwoLayers')
        ... def two_layers_units(backbone):
        ...     return [Unit('0', stage=0), Unit('1', stage=1)]
        >>> model = nn.ModuleDict(dict(backbone=TwoLayers()))
        >>> [unit.name for unit in find_units(model.train())]
        ['backbone.0', 'backbone.1']
    """

    def register(fn: UnitsFn) -> UnitsFn:
        ADAPTERS.update(dict.fromkeys(class_names, fn))
        return fn

    return register


def find_units(model: nn.Module) -> list[Unit]:
    """Lists the units of a model's backbone in the order in which they run.

    Args:
        model: A model of mmdet, mmpretrain or mmagic, or any module with a
            ``backbone`` or a ``generator``.

    Returns:
        Units whose names are relative to ``model``.

    Raises:
        ValueError: If the model has no backbone, or one that is not supported.

    Examples:
        >>> from torch import nn
        >>> from man_mm import CIFARResNet
        >>> from man_mm.backbones import find_units
        >>> model = nn.Module()
        >>> model.backbone = CIFARResNet(depth=8)
        >>> [unit.name for unit in find_units(model)]
        ['backbone.relu', 'backbone.layer1.0', 'backbone.layer2.0', 'backbone.layer3.0']
    """
    supported = (
        'Supported backbones: those in which one map (N, C, H, W) is handed on from '
        f'block to block, and by adapters {", ".join(sorted(ADAPTERS))}.'
    )
    try:
        place, backbone = find_backbone(model)
    except ValueError as error:
        raise ValueError(f'{error} {supported}') from None
    name = type(backbone).__name__
    bases = [cls.__name__ for cls in type(backbone).__mro__]
    if reason := next((_REFUSED[base] for base in bases if base in _REFUSED), None):
        raise ValueError(
            f'model.{place} is a {name}, which {reason}. It cannot be cut into '
            f'modules. {supported}'
        )
    adapter = next((ADAPTERS[base] for base in bases if base in ADAPTERS), None)
    if adapter is None and place == 'backbone':
        adapter = _discover
    units = adapter(backbone) if adapter else []
    if len(units) < 2 and adapter in (None, _discover):
        raise ValueError(
            f'model.{place} is a {name}, which local learning cannot cut yet: it was '
            f'not found to hand on one map from block to block. {supported} Write an '
            'adapter with man_mm.backbones.register_units to add one.'
        )
    return [
        replace(
            unit,
            name=f'{place}.{unit.name}',
            parts=tuple(f'{place}.{part}' for part in unit.parts),
            params=tuple(f'{place}.{param}' for param in unit.params),
        )
        for unit in units
    ]


def _discover(backbone: nn.Module) -> list[Unit]:
    """The units of a network without an adapter."""
    failures = []
    for side in trial_sides(backbone):
        try:
            with evaluating(backbone):
                return discover_units(backbone, black_image(backbone, side))
        except (RuntimeError, ValueError, AssertionError) as error:
            failures.append(error)
    raise ValueError(
        f'{type(backbone).__name__} was run on black images, to find where it can be '
        f'cut, and failed: {failures[0]}'
    ) from failures[0]


def find_backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """The network that is cut into units, and its name in the model.

    Args:
        model: A model of mmdet, mmpretrain or mmagic.

    Raises:
        ValueError: If there is none.
    """
    for place in ('backbone', 'generator'):
        if isinstance(backbone := getattr(model, place, None), nn.Module):
            return place, backbone
    raise ValueError(f'{type(model).__name__} has no backbone to cut.')


def probe(model: nn.Module, units: Sequence[Unit]) -> tuple[Tap, list[Tap]]:
    """Runs the backbone once on a black image to learn the shape of every unit's map.

    It also proves that the units lie on one path: each one has to run once, and to
    receive exactly the tensor that the one before it returned. What is behind the units
    may fail, as fully connected layers do that want images of another size.

    Args:
        model: Model with a backbone; left as it was, modes and buffers included.
        units: Its units, from `find_units`.

    Returns:
        A tap of what enters the first unit, and one tap a unit.

    Raises:
        ValueError: If the units are not on a single path, or the backbone fails on the
            black image.

    Examples:
        >>> from torch import nn
        >>> from man_mm import CIFARResNet
        >>> from man_mm.backbones import find_units, probe
        >>> model = nn.Module()
        >>> model.backbone = CIFARResNet(depth=8)
        >>> entry, taps = probe(model, find_units(model))
        >>> entry.channels, taps[-1].channels, taps[-1].stride
        (3, 64, 4)
    """
    _, backbone = find_backbone(model)
    inputs: dict[str, list[Tensor]] = {unit.name: [] for unit in units}
    calls: dict[str, list[tuple[tuple, Any]]] = {unit.name: [] for unit in units}
    handles = []
    for unit in units:

        def enter(_m, args, name=unit.name):
            inputs[name].append(args[0])

        def record(_m, args, output, name=unit.name):
            calls[name].append((args, output))

        start = model.get_submodule(unit.parts[0])
        handles.append(start.register_forward_pre_hook(enter))
        handles.append(model.get_submodule(unit.name).register_forward_hook(record))
    failures: dict[int, Exception] = {}
    try:
        for size in trial_sides(backbone):
            try:
                with evaluating(backbone):
                    backbone(black_image(backbone, size))
            except Exception as error:
                failures[size] = error
            if calls[units[-1].name]:
                break
            for records in (*inputs.values(), *calls.values()):
                records.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not calls[units[-1].name]:
        size = next(iter(failures), size)
        raise ValueError(
            f'{type(backbone).__name__} was run on a black image of {size}×{size} '
            'pixels, to learn the shapes of its maps, and failed before the last '
            f'unit, {units[-1].name!r}: {failures.get(size)}'
        ) from failures.get(size)

    def tap(name: str, stage: int, map_: Tensor) -> Tap:
        return Tap(name, stage, map_.shape[1], size // map_.shape[3])

    taps: list[Tap] = []
    previous = None
    for unit in units:
        runs, entered = calls[unit.name], inputs[unit.name]
        once = len(runs) == 1 and len(entered) == 1
        chained = once and (not taps or unit.gaps or entered[0] is previous)
        if not (chained and isinstance(tensor_of(runs[0][1]), Tensor)):
            raise ValueError(
                f'{type(backbone).__name__} cannot be cut around {unit.name!r}: it is '
                'not on a single path from the image to the output.'
            )
        args, output = runs[0]
        previous = tensor_of(output)
        map_ = unit.map_of(output, args)
        taps.append(tap(unit.name, unit.stage, map_))
    return tap(ENTRY, -1, inputs[units[0].name][0]), taps


def find_outputs(model: nn.Module, behind_neck: bool = False) -> list[Tap]:
    """Runs a detector's backbone on a black image to learn which maps it returns.

    Args:
        model: A detector of mmdet; left as it was.
        behind_neck: Whether to look behind the neck, if there is one.

    Returns:
        One tap a map, in order, whose names and stages are its places in it.
    """
    _, backbone = find_backbone(model)
    size = max(_LARGE, trial_sides(backbone)[0])
    network = model.extract_feat if behind_neck else backbone
    with evaluating(model):
        maps = network(black_image(backbone, size))
    maps = [maps] if isinstance(maps, Tensor) else maps
    return [
        Tap(str(index), index, map_.shape[1], size // map_.shape[3])
        for index, map_ in enumerate(maps)
    ]


def find_scale(backbone: nn.Module, size: int = 16) -> int:
    """How many times larger the image is that a super-resolution network returns.

    Args:
        backbone: A network that returns an image.
        size: Height and width in pixels of the image that it is tried with.
    """
    with evaluating(backbone):
        return backbone(black_image(backbone, size)).shape[-1] // size
