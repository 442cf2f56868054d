"""The auxiliary head of Decoupled Greedy Learning (DGL) for detectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmengine import registry as root
from torch import Tensor, nn

from man_mm.core import MemoryBank

from .base import AuxHead, AuxSite
from .blocks import conv_block
from .detector import (
    LightDetector,
    check_options,
    find_levels,
    model_strides,
    num_classes,
)

_LAYERS = 3


@root.MODELS.register_module()
class DGLDetHead(AuxHead):
    """Detects objects from one module's output alone.

    arXiv 2406.00446 compares MAN on COCO with DGL (arXiv 1901.08164) to which a feature
    pyramid was added, and describes it no further. Here: average pooling to the finest
    level of the head, where the module's output is finer; the three 1×1 convolutions of
    DGL's head, each with norm and ReLU; a pyramid whose coarser levels are max-pooled,
    as mmdet's FPN makes its extra ones; the dense head that `MANDetHead` has. So MAN
    differs in what it adds: maps of earlier modules, and an SLM. Objects too small for
    the module's own stride are assigned to it.

    Args:
        site: Where the head sits.
        channels: Width. Defaults to 64.
        num_convs: 3×3 convolutions of the dense head before classes, and again before
            boxes, beside the one that both share. Defaults to 0.
        cls_weight: Weight of the loss for classes, as in `MANDetHead`. Defaults to 1.0.

    Raises:
        ValueError: If an option is out of range, or the model is not a detector.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from man_mm import build_learner
        >>> model = get_model('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
        >>> partition, aux_head = dict(type='StagePartition'), dict(type='DGLDetHead')
        >>> learner = build_learner(model, partition, aux_head)
        >>> [type(head).__name__ for head in learner.heads]
        ['DGLDetHead', 'DGLDetHead']
    """

    reads = frozenset()

    def __init__(
        self,
        site: AuxSite,
        channels: int = 64,
        num_convs: int = 0,
        cls_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_options(channels, num_convs, cls_weight)
        num_classes(site.model)  # refuses what is no detector
        own = site.own[-1]
        self.own = own.name
        finest = find_levels(model_strides(site.model))[0]
        stride = max(own.stride, finest)
        # On the first stage's map, these convolutions would set the peak of memory.
        self.pool = nn.AvgPool2d(stride // own.stride, ceil_mode=True)
        widths = [own.channels] + [channels] * _LAYERS
        self.convs = nn.Sequential(
            *(conv_block(*pair, 1) for pair in zip(widths, widths[1:], strict=False))
        )
        site = replace(site, own=(replace(own, channels=channels, stride=stride),))
        self.detector = LightDetector(
            site,
            channels,
            num_convs,
            cls_weight,
            num_blocks=0,
            levels='all',
            use_bank=False,
        )

    def forward(
        self, maps: Mapping[str, Tensor], targets: Any, bank: MemoryBank | None
    ) -> dict[str, Any]:
        """Local detection losses; see `AuxHead.forward`."""
        map_ = self.convs(self.pool(maps[self.own]))
        return self.detector({self.own: map_}, targets, bank)
