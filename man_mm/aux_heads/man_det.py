"""The MAN auxiliary head for detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine import registry as root
from torch import Tensor

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .detector import LightDetector, check_options
from .faithful_det import FaithfulDetector


@root.MODELS.register_module()
class MANDetHead(AuxHead):
    """Detects objects from one module's output and the memory bank.

    Number of classes, strides, anchor scale and box coding are the model's own.
    After arXiv 2406.00446, section 3.3.

    - ``light``: a `LocalPyramid` and mmdet's ATSS head, one anchor a location and
      few channels. Detectors of any kind get the same head, with their classes.
    - ``faithful``: one full residual block for each later stage, then copies of the
      model's own neck and heads, as the paper describes it; large.

    Args:
        site: Where the head sits.
        mode: ``'light'`` or ``'faithful'``. Defaults to ``'light'``.
        channels: Width of a light head. Defaults to 64.
        num_convs: 3×3 convolutions of a light head before classes, and again before
            boxes, beside the one that both share. Defaults to 0.
        cls_weight: Weight of a light head's loss for classes; that of the boxes' is 2,
            and 1 for centerness. From scratch, 0.25 can do better (docs/detection.md).
            Defaults to 1.0.
        num_blocks: 3×3 convolutions of a light SLM for each level coarser than the
            module's output; with 0 there is no SLM, and max pooling makes these
            levels. Defaults to 1.
        levels: Which levels a light head predicts on: ``'all'`` of the model from
            stride 8 on, as far as there are maps for them, or the one of the module's
            ``'own'`` stride, for which the bank is not read. Defaults to ``'all'``.
        use_bank: Whether to read maps of earlier modules. Defaults to True.

    Raises:
        ValueError: If an option is unknown or does not fit the model.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
        >>> partition = dict(type='StagePartition')
        >>> aux_head = dict(type='MANDetHead', num_convs=1)
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['MANDetHead', 'MANDetHead']
    """

    def __init__(
        self,
        site: AuxSite,
        mode: str = 'light',
        channels: int = 64,
        num_convs: int = 0,
        cls_weight: float = 1.0,
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
        check_options(channels, num_convs, cls_weight)
        if num_blocks < 0:
            raise ValueError(
                f'aux_head.num_blocks must be at least 0, got {num_blocks}.'
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
                site, channels, num_convs, cls_weight, num_blocks, levels, use_bank
            )
            names = {tap.name for tap in self.detector.pyramid.sources.values()}
        self.reads = frozenset(tap.name for tap in site.earlier) & names

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        return self.detector(maps, targets, bank)
