"""The auxiliary detector of the paper: real blocks, copies of neck and heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxSite
from .copies import fresh_block


class FaithfulDetector(nn.Module):
    """One residual block for each later stage, then copies of neck and heads.

    Blocks are copies of the backbone's own, with weights of their own. They keep
    their BatchNorm in evaluation mode where the backbone does (``norm_eval``).

    Args:
        site: Where the head sits.
        use_bank: Whether maps of earlier modules are readable.

    Raises:
        ValueError: If the model's neck needs earlier maps and ``use_bank`` is False.
    """

    def __init__(self, site: AuxSite, use_bank: bool) -> None:
        super().__init__()
        backbone = site.model.backbone
        stages = backbone.out_indices
        readable = {tap.stage: tap.name for tap in site.earlier if use_bank}
        readable.update({tap.stage: tap.name for tap in site.own})
        self.own = site.own[-1].name
        self.later = [tap.stage for tap in site.later]
        finished = {s: name for s, name in readable.items() if s not in self.later}
        missing = [s for s in stages if s not in finished and s not in self.later]
        if missing:
            raise ValueError(
                f"aux_head.mode='faithful' copies a neck that reads stages {missing} "
                'of earlier modules: set aux_head.use_bank=True.'
            )
        self.inputs = [(s, finished.get(s)) for s in stages]
        self.norm_eval = getattr(backbone, 'norm_eval', False)
        self.slm = nn.ModuleList(
            fresh_block(site.model, stage, whole=stage != site.own[-1].stage)
            for stage in self.later
        )
        # The copy gets a stub in place of the backbone, which hands on given maps.
        self.detector = copy.deepcopy(site.model, {id(backbone): nn.Identity()})
        self.detector.init_weights()

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Losses of the copied heads; see `AuxHead.forward`."""
        x, outputs = maps[self.own], {}
        for stage, block in zip(self.later, self.slm, strict=True):
            x = outputs[stage] = block(x)
        levels = [
            outputs[stage] if name is None else maps[name]
            for stage, name in self.inputs
        ]
        return self.detector.loss(tuple(levels), targets)

    def train(self, mode: bool = True) -> FaithfulDetector:
        """Sets the mode; BatchNorm of the blocks follows the backbone's habit."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.slm.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
