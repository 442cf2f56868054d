"""What every auxiliary head receives and must return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from man_mm.backbones import Tap
from man_mm.core import LocalModule, MemoryBank
from man_mm.core.partition import outlets


@dataclass(frozen=True)
class AuxSite:
    """The place in a network where an auxiliary head sits.

    Attributes:
        model: The whole model, to read its settings from; heads must not keep it.
        module: The module that the head trains.
        own: Maps of the module itself that the head may read: stage ends, and last
            the module's output.
        earlier: Maps of earlier modules, readable through the memory bank.
        later: Ends of the stages that the module has not finished: the map sizes
            that an SLM (Simple Local Module) has to add.
        entry: What enters the first unit: the image, or the shallow features of a
            network with a global skip. In the bank of heads whose ``reads`` name it.
        path: Taps of all units of the network, in the order in which they run.
        num_modules: Number of modules K of the network.

    Examples:
        >>> from torch import nn
        >>> from man_mm import CIFARResNet, StagePartition, split
        >>> from man_mm.aux_heads import find_sites
        >>> from man_mm.backbones import find_units, probe
        >>> model = nn.Module()
        >>> model.backbone = CIFARResNet(depth=8)
        >>> units = find_units(model)
        >>> modules = split(model, units, StagePartition().cuts(units))
        >>> first, second = find_sites(model, modules, *probe(model, units))
        >>> second.own
        (Tap(name='backbone.layer2.0', stage=1, channels=32, stride=2),)
        >>> [tap.name for tap in second.earlier]
        ['backbone.layer1.0']
    """

    model: nn.Module
    module: LocalModule
    own: tuple[Tap, ...]
    earlier: tuple[Tap, ...]
    later: tuple[Tap, ...]
    entry: Tap
    path: tuple[Tap, ...]
    num_modules: int

    @property
    def ahead(self) -> tuple[Tap, ...]:
        """Taps of the units of later modules, in order."""
        cut = [tap.name for tap in self.path].index(self.module.cut)
        return self.path[cut + 1 :]

    def interpolate(self, first: float, last: float) -> float:
        """A value between that of the first auxiliary head and that of the last."""
        share = self.module.index / max(self.num_modules - 2, 1)
        return (1 - share) * first + share * last


class AuxHead(nn.Module, ABC):
    """Turns a module's output into the loss that trains the module.

    Attributes:
        needs_bank: Whether the head reads the memory bank.
        reads: Names of the maps of earlier modules that `forward` looks up, which
            thus have to live until then; None for any of ``site.earlier``.
        reads_averages: Whether averages ``(N, C, 1, 1)`` of these maps will do.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy
        >>> from man_mm import AuxHead
        >>> class PooledHead(AuxHead):
        ...     def __init__(self, site, num_classes=10):
        ...         super().__init__()
        ...         self.own = site.own[-1].name
        ...         self.classifier = nn.Linear(site.own[-1].channels, num_classes)
        ...
        ...     def forward(self, maps, targets, bank):
        ...         pooled = maps[self.own].mean((2, 3))
        ...         return cross_entropy(self.classifier(pooled), targets)
        >>> site = SimpleNamespace(own=[SimpleNamespace(name='layer1', channels=8)])
        >>> maps = dict(layer1=torch.rand(2, 8, 4, 4))
        >>> PooledHead(site)(maps, targets=torch.tensor([3, 7]), bank=None).shape
        torch.Size([])
    """

    needs_bank: bool = False
    reads: frozenset[str] | None = None
    reads_averages: bool = False

    @abstractmethod
    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> Tensor | dict[str, Any]:
        """Computes the local loss.

        Args:
            maps: Feature maps ``(N, C, H, W)`` by unit name: ``site.own`` with
                their graph, ``site.earlier`` detached if there is a bank.
            targets: What the model's own loss is computed from: the list of data
                samples in OpenMMLab.
            bank: The memory bank, for its long-term statistics.

        Returns:
            A scalar, or a dictionary in which each key with ``loss`` is a term.
        """


def in_full_precision(_module: nn.Module, _args: tuple, outputs: Any) -> Any:
    """Forward hook: predictions in float32, since losses underflow in half precision.

    Logarithms and divisions in them have bounds such as 1e-8, which is 0 in float16.
    """
    if isinstance(outputs, list | tuple):
        return type(outputs)(in_full_precision(_module, _args, x) for x in outputs)
    is_half = outputs.dtype in (torch.float16, torch.bfloat16)
    return outputs.float() if is_half else outputs


def find_sites(
    model: nn.Module, modules: list[LocalModule], entry: Tap, taps: list[Tap]
) -> list[AuxSite]:
    """Describes the places of the auxiliary heads of a partitioned model.

    Args:
        model: The whole model.
        modules: Its K modules.
        entry: Tap of what enters the first unit, from `man_mm.backbones.probe`.
        taps: One tap a unit, from there too.

    Returns:
        K - 1 sites, one for each module but the last.
    """
    by_name = {tap.name: tap for tap in taps}
    ends = [
        tap
        for tap, after in zip(taps, taps[1:], strict=False)
        if tap.stage != after.stage
    ]
    ends.append(taps[-1])
    sites, earlier = [], []
    for module in modules[:-1]:
        own = [by_name[name] for name in outlets(module)]
        finished = {tap.name for tap in (*own, *earlier)}
        later = [
            end
            for end in ends
            if end.stage >= own[-1].stage and end.name not in finished
        ]
        maps = (tuple(own), tuple(earlier), tuple(later))
        path = (entry, tuple(taps), len(modules))
        sites.append(AuxSite(model, module, *maps, *path))
        earlier += own
    return sites
