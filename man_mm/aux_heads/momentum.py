"""The Momentum Auxiliary Network: a moving average of the block that comes next."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .copies import chained, fresh_copy, unit_parts

_INFOPRO = dict(type='InfoProHead')


@root.MODELS.register_module()
class MomentumHead(AuxHead):
    """Puts the block that comes next, as a moving average, in front of another head.

    After Su et al., ECCV 2024 (arXiv 2407.05623), and its successor MAN++ (arXiv
    2507.16279): the first unit of the next module is there twice, once following that
    unit's weights as an exponential moving average without gradient, once as a copy
    that learns, since features differ from module to module. Their outputs are added
    with the weights 2 - s and s, where s is learned from 1 on. Another method's head
    reads the sum.

    Both copies start from the weights that the unit has when training starts. The
    average moves once for each update of the model; its batch norms use the statistics
    of the batch, as those of the unit do.

    Args:
        site: Where the head sits.
        momentum: Share of the old average in each update, in [0, 1). Defaults to 0.995.
        head: Config of the head behind. Defaults to ``InfoProHead``, as published.

    Raises:
        ValueError: If ``momentum`` is out of range, or the next unit does not work on
            maps.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='MomentumHead', momentum=0.99)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['MomentumHead', 'MomentumHead', 'MomentumHead']
    """

    def __init__(
        self,
        site: AuxSite,
        momentum: float = 0.995,
        head: dict[str, Any] = _INFOPRO,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f'aux_head.momentum must be in [0, 1), got {momentum}.')
        own, following = site.own[-1], site.ahead[0]
        self.own = own.name
        self.momentum = momentum
        self.copied = following.name
        self._parts = unit_parts(site.model, following.name)
        self.learned = fresh_copy(site.model, following.name)
        self.average = copy.deepcopy(self.learned).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer('updates', torch.zeros((), dtype=torch.long))
        self._starts: bool | None = None  # unknown: to be read from ``updates``
        # The head behind finds the sum under the name of the module's own map.
        own = replace(following, name=own.name)
        site = replace(site, own=(*site.own[:-1], own))
        self.head = root.MODELS.build(dict(copy.deepcopy(head), site=site))
        self.needs_bank = self.head.needs_bank
        self.reads = self.head.reads
        self.reads_averages = self.head.reads_averages

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Moves the average towards the model's weights; copies them the first time.

        Args:
            model: The whole model.
        """
        unit = chained(model, self._parts)
        if self._starts is None:
            self._starts = not self.updates
        if self._starts:
            self.learned.load_state_dict(unit.state_dict())
            self.average.load_state_dict(unit.state_dict())
        else:
            for mean, new in zip(
                self.average.parameters(), unit.parameters(), strict=True
            ):
                mean.lerp_(new, 1 - self.momentum)
            for mine, its in zip(self.average.buffers(), unit.buffers(), strict=True):
                mine.copy_(its)
        self.updates += 1
        self._starts = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._starts = None

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Loss of the head behind; see `AuxHead.forward`."""
        map_ = maps[self.own]
        ahead = self.scale * self.learned(map_) + (2 - self.scale) * self.average(map_)
        return self.head({**maps, self.own: ahead}, targets, bank)
