"""The auxiliary detector of the paper: real blocks, copies of neck and heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from man_mm.backbones import find_outputs
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
        ValueError: If the model's neck needs earlier maps and ``use_bank`` is False,
            the backbone works on tokens, or one block does not do for a stage.
    """

    def __init__(self, site: AuxSite, use_bank: bool) -> None:
        super().__init__()
        backbone = site.model.backbone
        if site.module.units[-1].as_map is not None:
            raise ValueError(
                "aux_head.mode='faithful' copies blocks that work on maps (N, C, H, W),"
                f' and those of {type(backbone).__name__} work on tokens: set '
                "aux_head.mode='light'."
            )
        stages = _read_stages(site)
        readable = {tap.stage: tap.name for tap in site.earlier if use_bank}
        readable.update({tap.stage: tap.name for tap in site.own})
        self.own = site.own[-1].name
        self.later = [tap.stage for tap in site.later]
        _check_blocks(site)
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
        return self.detector.loss(tuple(levels), copy_targets(targets))

    def train(self, mode: bool = True) -> FaithfulDetector:
        """Sets the mode; BatchNorm of the blocks follows the backbone's habit."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.slm.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def copy_targets(targets: Sequence[Any]) -> list[Any]:
    """Data samples of the same values, for losses that replace fields of theirs.

    Args:
        targets: Data samples of mmdet, which stay as they are.
    """
    copies = [sample.clone() for sample in targets]
    for sample in copies:
        sample.set_data({name: field.clone() for name, field in sample.items()})
    return copies


def _check_blocks(site: AuxSite) -> None:
    """Refuses stages that end with another map than the block that stands for them.

    Raises:
        ValueError: If a stage has several widths or strides, as the last one of SSD.
    """
    begins = {tap.stage: tap for tap in reversed(site.path)}
    begins[site.own[-1].stage] = site.own[-1]
    for end in site.later:
        begin = begins[end.stage]
        if (begin.channels, begin.stride) != (end.channels, end.stride):
            raise ValueError(
                "aux_head.mode='faithful' puts one block in place of each later stage, "
                f'but between {begin.name!r} and {end.name!r} channels or strides '
                "change: set aux_head.mode='light'."
            )


def _read_stages(site: AuxSite) -> list[int]:
    """The stages that the neck reads, found by the shapes of the maps.

    Raises:
        ValueError: If the backbone returns a map that is the end of no stage.
    """
    ends = {tap.stage: tap for tap in site.path}
    shapes = {(end.channels, end.stride): stage for stage, end in ends.items()}
    outputs = [(tap.channels, tap.stride) for tap in find_outputs(site.model)]
    if missing := set(outputs) - set(shapes):
        raise ValueError(
            "aux_head.mode='faithful' copies a neck that reads the ends of stages, but "
            f'{type(site.model.backbone).__name__} returns maps (channels, stride) '
            f"{sorted(missing)}, which no stage ends with: set aux_head.mode='light'."
        )
    return [shapes[output] for output in outputs]
