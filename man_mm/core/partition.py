"""Where a network is cut, and which module owns which parameter."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .returned import sizes_of, tensor_of

# Measures what each unit costs for images of a shape; see `man_mm.measure`.
Measure = Callable[..., list[Any]]


@dataclass(frozen=True)
class Unit:
    """The smallest slice that a network can be cut into.

    Attributes:
        name: Dotted name of the submodule whose output ends the unit, such as
            ``'backbone.layer3.5'``; also the name of the cut after it.
        stage: Index of the stage that the unit belongs to; -1 for a stem.
        parts: Dotted names of all submodules that the unit consists of.
        params: Dotted names of parameters that belong to the unit, but to none of its
            parts, such as a position embedding.
        read_elsewhere: Whether the network reads the output in another place too,
            beside the next unit (and the neck, which reads the ends of stages).
        as_map: From the output and the arguments of the submodule ``name`` to a map
            ``(N, C, H, W)`` without a copy, for units that output something else,
            such as tokens. What is returned behind a tensor, such as a size, comes
            behind the arguments.
        gaps: Whether the network computes something outside of submodules between
            the parts, or in front of the first one.

    Examples:
        >>> from man_mm import Unit
        >>> Unit('backbone.layer1.0').parts
        ('backbone.layer1.0',)
        >>> first = Unit('layer1.0', stage=0, parts=('conv1', 'layer1.0'))
        >>> first.name
        'layer1.0'
    """

    name: str
    stage: int = 0
    parts: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    read_elsewhere: bool = False
    as_map: Callable[[Tensor, tuple], Tensor] | None = None
    gaps: bool = False

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, 'parts', (self.name,))

    def map_of(self, output: Tensor, args: tuple) -> Tensor:
        """The output as a map ``(N, C, H, W)``.

        Args:
            output: What the submodule ``name`` returned.
            args: What it was called with.
        """
        tensor = tensor_of(output)
        if self.as_map is None:
            return tensor
        return self.as_map(tensor, (*args, *sizes_of(output)))


@dataclass(frozen=True)
class LocalModule:
    """The units between two cuts, with the parameters that they own.

    Attributes:
        index: Position in the network, from 0.
        units: The units in the order in which they run.
        params: Trainable parameters that the module owns. The last module also
            owns whatever no unit covers: neck, heads, classifier.
        is_last: Whether the model's own loss trains this module.

    Examples:
        >>> from torch import nn
        >>> from man_mm import Unit, split
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> first, last = split(model, [Unit('0'), Unit('1'), Unit('2')], cuts=['1'])
        >>> first.name, first.cut, first.is_last
        ('module1', '1', False)
        >>> len(last.params)
        2
    """

    index: int
    units: tuple[Unit, ...]
    params: tuple[nn.Parameter, ...]
    is_last: bool

    @property
    def name(self) -> str:
        """Name in logs and messages, counted from 1 as in the literature."""
        return f'module{self.index + 1}'

    @property
    def cut(self) -> str:
        """Dotted name of the submodule after which the module ends."""
        return self.units[-1].name

    @property
    def parts(self) -> list[str]:
        """Dotted names of all submodules that the units consist of."""
        return [part for unit in self.units for part in unit.parts]


def ends_of_stages(units: Sequence[Unit]) -> list[tuple[Unit, Unit]]:
    """Units that end a stage, each with the unit that follows it.

    Args:
        units: Units in the order in which they run; a stem ends no stage.
    """
    return [
        (unit, following)
        for unit, following in zip(units, units[1:], strict=False)
        if unit.stage != following.stage and unit.stage >= 0
    ]


def branches(module: LocalModule) -> list[tuple[Unit, Unit]]:
    """Units inside a module that others than the next unit read, each with the latter.

    Args:
        module: The module.
    """
    ends = ends_of_stages(module.units)
    pairs = zip(module.units, module.units[1:], strict=False)
    return [pair for pair in pairs if pair in ends or pair[0].read_elsewhere]


def outlets(module: LocalModule) -> list[str]:
    """Names of the units whose maps auxiliary heads may read: the branches and the cut.

    Args:
        module: The module.
    """
    return [*(unit.name for unit, _ in branches(module)), module.cut]


class StagePartition:
    """Cuts after every stage of the backbone, as in the paper.

    Modules without a trainable parameter are merged with the next one.

    Examples:
        >>> from man_mm import StagePartition, Unit
        >>> units = [Unit('layer1.0', 0), Unit('layer1.1', 0), Unit('layer2.0', 1)]
        >>> StagePartition().cuts(units)
        ['layer1.1']
    """

    def cuts(self, units: Sequence[Unit], _measure: Measure | None = None) -> list[str]:
        """Names of the units after which to cut, the last unit excluded.

        Args:
            units: All units, in the order in which they run.
        """
        return [unit.name for unit, _ in ends_of_stages(units)]


class UniformPartition:
    """Cuts into modules of equal numbers of units, as the literature does.

    Where that leaves a rest, the earlier modules are the smaller ones.

    Args:
        num_modules: Number of modules K; as many as there are units cuts everywhere.

    Raises:
        ValueError: If ``num_modules`` is less than 1.

    Examples:
        >>> from man_mm import UniformPartition, Unit
        >>> units = [Unit('layer1.0', 0), Unit('layer1.1', 0), Unit('layer2.0', 1)]
        >>> UniformPartition(num_modules=3).cuts(units)
        ['layer1.0', 'layer1.1']
    """

    def __init__(self, num_modules: int) -> None:
        if num_modules < 1:
            raise ValueError(
                f'partition.num_modules must be at least 1, got {num_modules}.'
            )
        self.num_modules = num_modules

    def cuts(self, units: Sequence[Unit], _measure: Measure | None = None) -> list[str]:
        """Names of the units after which to cut.

        Args:
            units: All units, in the order in which they run.

        Raises:
            ValueError: If there are fewer units than modules.
        """
        if self.num_modules > len(units):
            raise ValueError(
                f'partition.num_modules is {self.num_modules}, but the network has '
                f'only {len(units)} units: give 1 to {len(units)}.'
            )
        ends = (i * len(units) // self.num_modules for i in range(1, self.num_modules))
        return [units[end - 1].name for end in ends]


class CutPartition:
    """Cuts after the named units.

    Args:
        cuts: Dotted names such as ``'backbone.layer2.1'``; the name of a whole
            stage (``'backbone.layer2'``) stands for its last unit. An empty list
            is end-to-end training (K = 1).

    Examples:
        >>> from man_mm import CutPartition, Unit
        >>> units = [Unit('layer1.0', 0), Unit('layer1.1', 0), Unit('layer2.0', 1)]
        >>> CutPartition(['layer1']).cuts(units)
        ['layer1.1']
    """

    def __init__(self, cuts: Sequence[str]) -> None:
        if isinstance(cuts, str):
            raise ValueError(f'partition.cuts must be a list of names, got {cuts!r}.')
        self._cuts = list(cuts)

    def cuts(self, units: Sequence[Unit], _measure: Measure | None = None) -> list[str]:
        """Names of the units after which to cut.

        Args:
            units: All units, in the order in which they run.

        Raises:
            ValueError: If a name is unknown, given twice, out of order, or the
                last unit, after which nothing is left to train.
        """
        names = [unit.name for unit in units]
        if len(self._cuts) >= len(units):
            raise ValueError(
                f'partition.cuts asks for {len(self._cuts) + 1} modules, but the '
                f'network has only {len(units)} units: give at most '
                f'{len(units) - 1} cuts.'
            )
        cuts = [_resolve(cut, names) for cut in self._cuts]
        positions = [names.index(cut) for cut in cuts]
        if any(a >= b for a, b in zip(positions, positions[1:], strict=False)):
            raise ValueError(
                'partition.cuts must name different units in the order in which '
                f'they run, got {self._cuts}.'
            )
        if cuts and cuts[-1] == names[-1]:
            raise ValueError(
                f'partition.cuts ends with {self._cuts[-1]!r}, the last unit: '
                'drop it, the last module is trained by the model itself.'
            )
        return cuts


def split(
    model: nn.Module, units: Sequence[Unit], cuts: Sequence[str]
) -> list[LocalModule]:
    """Groups units into modules and gives every parameter exactly one owner.

    Args:
        model: The whole network; the units' names are relative to it.
        units: All units, in the order in which they run.
        cuts: Names of the units after which to cut, in order.

    Returns:
        The K modules. Those in which nothing is trainable (frozen stages) are
        merged with the next one, so K can be smaller than ``len(cuts) + 1``.

    Raises:
        ValueError: If a cut is not a unit that another one follows, or a parameter
            belongs to units of two modules.

    Examples:
        >>> from torch import nn
        >>> from man_mm import Unit, split
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> modules = split(model, [Unit('0'), Unit('1'), Unit('2')], cuts=['1'])
        >>> [(module.name, module.cut) for module in modules]
        [('module1', '1'), ('module2', '2')]
    """
    if unknown := set(cuts) - {unit.name for unit in units[:-1]}:
        raise ValueError(
            f'{sorted(unknown)} cannot be cuts: a cut is the name of a unit that '
            'another unit follows.'
        )
    groups: list[list[Unit]] = [[]]
    for unit in units:
        groups[-1].append(unit)
        if unit.name in cuts and next(_trainable(model, groups[-1]), None) is not None:
            groups.append([])

    modules, owner = [], {}
    for index, group in enumerate(groups):
        is_last = index == len(groups) - 1
        params = _rest(model, groups) if is_last else _trainable(model, group)
        owned = []
        for param in params:
            if param in owner and owner[param] != index:
                raise ValueError(
                    f'A parameter is shared by the modules {owner[param] + 1} and '
                    f'{index + 1}: move the cut {groups[owner[param]][-1].name!r} '
                    'so that both uses are in one module.'
                )
            if param not in owner:
                owner[param] = index
                owned.append(param)
        modules.append(LocalModule(index, tuple(group), tuple(owned), is_last))
    return modules


def _trainable(model: nn.Module, units: Sequence[Unit]):
    for unit in units:
        for part in unit.parts:
            for param in model.get_submodule(part).parameters():
                if param.requires_grad:
                    yield param
        yield from (param for param in _own_params(model, unit) if param.requires_grad)


def _own_params(model: nn.Module, unit: Unit) -> list[nn.Parameter]:
    """Parameters that a unit has beside its parts."""
    paths = [name.rpartition('.') for name in unit.params]
    return [getattr(model.get_submodule(holder), name) for holder, _, name in paths]


def _rest(model: nn.Module, groups: Sequence[Sequence[Unit]]):
    """Trainable parameters of the last units, and of whatever no unit covers."""
    *earlier, last = (
        {
            submodule
            for unit in group
            for part in unit.parts
            for submodule in model.get_submodule(part).modules()
        }
        for group in groups
    )
    inside = set().union(*earlier) - last
    owned = {p for group in groups[:-1] for u in group for p in _own_params(model, u)}
    for submodule in model.modules():
        if submodule not in inside:
            for param in submodule.parameters(recurse=False):
                if param.requires_grad and param not in owned:
                    yield param


def _resolve(cut: str, names: Sequence[str]) -> str:
    if cut in names:
        return cut
    inside = [name for name in names if name.startswith(f'{cut}.')]
    if inside:
        return inside[-1]
    close = difflib.get_close_matches(cut, names, n=3) or list(names[:3])
    raise ValueError(
        f'partition.cuts has {cut!r}, after which this network cannot be cut. Did '
        f'you mean {", ".join(map(repr, close))}? The {len(names)} units run from '
        f'{names[0]!r} to {names[-1]!r}.'
    )
