"""The MAN auxiliary head for detectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite, in_full_precision
from .faithful_det import FaithfulDetector
from .pyramid import LocalPyramid

_FINEST_STRIDE = 8


@root.MODELS.register_module()
class MANDetHead(AuxHead):
    """Detects objects from one module's output and the memory bank.

    Number of classes, strides, anchor scale and box coding are the model's own.
    After arXiv 2406.00446, section 3.3.

    - ``light``: a `LocalPyramid` and mmdet's ATSS head, one anchor a location and
      few channels. Two-stage detectors get the same head, with their classes.
    - ``faithful``: one full residual block for each later stage, then copies of the
      model's own neck and heads, as the paper describes it; large.

    Args:
        site: Where the head sits.
        mode: ``'light'`` or ``'faithful'``.
        channels: Width of a light head. Default: 64.
        num_convs: 3×3 convolutions of a light head before classes, and again before
            boxes, beside the one that both share. Default: 0.
        num_blocks: 3×3 convolutions of a light SLM for each level coarser than the
            module's output; with 0 there is no SLM, and max pooling makes these
            levels. Default: 1.
        levels: Which levels a light head predicts on: ``'all'`` of the model from
            stride 8 on, as far as there are maps for them, or the one of the module's
            ``'own'`` stride, for which the bank is not read. Default: ``'all'``.
        use_bank: Whether to read maps of earlier modules. Default: True.

    Raises:
        ValueError: If an option is unknown or does not fit the model.
    """

    def __init__(
        self,
        site: AuxSite,
        mode: str = 'light',
        channels: int = 64,
        num_convs: int = 0,
        num_blocks: int = 1,
        levels: str = 'all',
        use_bank: bool = True,
    ) -> None:
        super().__init__()
        for key, value, known in (
            ('mode', mode, ('light', 'faithful')),
            ('levels', levels, ('all', 'own')),
        ):
            if value not in known:
                raise ValueError(
                    f'aux_head.{key} must be one of {known}, got {value!r}.'
                )
        if channels < 1 or num_convs < 0 or num_blocks < 0:
            raise ValueError(
                'aux_head.channels must be at least 1, aux_head.num_convs and '
                f'aux_head.num_blocks at least 0, got {channels}, {num_convs} and '
                f'{num_blocks}.'
            )
        if mode == 'faithful' and (num_blocks, levels) != (1, 'all'):
            raise ValueError(
                "aux_head.mode='faithful' copies a neck and heads that need every "
                "level: set aux_head.num_blocks=1 and aux_head.levels='all', or "
                "aux_head.mode='light'."
            )
        use_bank = use_bank and levels == 'all'
        self.needs_bank = use_bank and bool(site.earlier)
        if mode == 'faithful':
            self.detector = FaithfulDetector(site, use_bank)
            names = {name for _, name in self.detector.inputs}
        else:
            self.detector = LightDetector(
                site, channels, num_convs, num_blocks, levels, use_bank
            )
            names = {tap.name for tap in self.detector.pyramid.sources.values()}
        self.reads = frozenset(tap.name for tap in site.earlier) & names

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        return self.detector(maps, targets, bank)


class LightDetector(nn.Module):
    """`LocalPyramid` and an ATSS head of mmdet; arguments as in `MANDetHead`."""

    def __init__(
        self,
        site: AuxSite,
        channels: int,
        num_convs: int,
        num_blocks: int,
        levels: str,
        use_bank: bool,
    ) -> None:
        super().__init__()
        dense = dense_head(site.model)
        strides = find_levels(model_strides(dense))
        if levels == 'own':
            strides = [max(site.own[-1].stride, strides[0])]
        maps = (*site.earlier, *site.own) if use_bank else site.own
        self.pyramid = LocalPyramid(maps, strides, channels, num_blocks)
        self.head = root.MODELS.build(
            dict(
                type='mmdet.ATSSHead',
                num_classes=num_classes(site.model),
                in_channels=channels,
                feat_channels=channels,
                stacked_convs=num_convs,
                norm_cfg=dict(type='GN', num_groups=math.gcd(8, channels)),
                anchor_generator=dict(
                    type='AnchorGenerator',
                    ratios=[1.0],
                    octave_base_scale=anchor_scale(dense),
                    scales_per_octave=1,
                    strides=self.pyramid.levels,
                ),
                loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
                train_cfg=dict(
                    assigner=dict(type='ATSSAssigner', topk=9),
                    allowed_border=-1,
                    pos_weight=-1,
                    debug=False,
                ),
            )
        )
        self.head.init_weights()
        self.head.register_forward_hook(in_full_precision)
        self._assign = self.head.get_targets
        self.head.get_targets = self._get_targets
        self._shared: dict = {}
        coder = getattr(dense, 'bbox_coder', None)
        if type(coder).__name__ == 'DeltaXYWHBBoxCoder':
            self.head.bbox_coder = copy.deepcopy(coder)

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        self._shared = {} if bank is None else bank.shared
        losses = self.head.loss(tuple(self.pyramid(maps, bank)), targets)
        self._shared = {}  # nothing of a step may survive it
        return losses

    def _get_targets(self, anchors: list, *args: Any, **kwargs: Any) -> tuple:
        # Heads on the same grid have the same targets: assign them once a step.
        grid = tuple(len(level) for level in anchors[0])
        if grid not in self._shared:
            self._shared[grid] = self._assign(anchors, *args, **kwargs)
        return self._shared[grid]


def dense_head(model: nn.Module) -> nn.Module:
    """The detector's head on dense locations: RPN or single-stage head.

    Raises:
        ValueError: If the model is no such detector.
    """
    head = getattr(model, 'rpn_head', None) or getattr(model, 'bbox_head', None)
    if head is None:
        raise ValueError(
            f'MANDetHead trains detectors of mmdet with an rpn_head or a bbox_head, '
            f"not {type(model).__name__}: set aux_head.type='MANHead', which chooses."
        )
    return head


def num_classes(model: nn.Module) -> int:
    """Number of classes of a one-stage or two-stage detector."""
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None:
        return model.bbox_head.num_classes
    bbox_head = roi_head.bbox_head
    if isinstance(bbox_head, nn.ModuleList):
        bbox_head = bbox_head[0]
    return bbox_head.num_classes


def model_strides(dense: nn.Module) -> list[int]:
    """Strides in pixels of the levels that a dense head predicts on.

    Raises:
        ValueError: If the head does not predict on a grid.
    """
    generator = getattr(dense, 'prior_generator', None)
    if generator is None:
        raise ValueError(
            f'MANDetHead cannot read strides from {type(dense).__name__}, which has '
            'no prior_generator: use a detector with a dense head (RetinaNet, FCOS, '
            'ATSS, RPN, ...).'
        )
    return [s[0] if isinstance(s, tuple) else s for s in generator.strides]


def anchor_scale(dense: nn.Module) -> float:
    """Anchor side in strides: the geometric mean of the model's own anchor scales.

    8, the scale of ATSS, for models without anchors.
    """
    scales = getattr(dense.prior_generator, 'scales', None)
    if scales is None:
        return 8.0
    return float(scales.log().mean().exp())


def find_levels(strides: list[int]) -> list[int]:
    """Powers of two that span the model's strides, from stride 8 on.

    Stride 4 would cost more than all other levels together.
    """
    first = max(min(strides), min(_FINEST_STRIDE, max(strides)))
    exponents = range(round(math.log2(first)), round(math.log2(max(strides))) + 1)
    return [2**exponent for exponent in exponents]
