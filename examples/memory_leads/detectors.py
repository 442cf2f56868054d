"""Leads of detectors with one dense head.

Features are those of the finest level at the centers of the objects.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor

from man_mm import MANDetHead
from man_mm.aux_heads.detector import num_classes
from man_mm.core.local_losses import total_loss

from .leads import ContrastTerm, Lead, PrototypeTerm, samples_of


class DetLead(Lead, MANDetHead):
    """A lead of detectors."""

    def __init__(self, site, **options):
        super().__init__(site, use_bank=False, **options)
        self.num_classes = num_classes(site.model)
        self.width = self.detector.head.in_channels
        self.deep = site.model.bbox_head.in_channels
        self.finest = []
        self.detector.head.register_forward_pre_hook(
            lambda _, args: self.finest.append(args[0][0])
        )

    def forward(self, maps, targets, bank):
        loss = total_loss(super().forward(maps, targets, bank))
        features, labels = at_objects(self.finest.pop(), targets)
        return self.joined(loss, features, labels, maps)

    def watch_deep(self, model, remember):
        """Calls ``remember`` with what the real head reads, and the labels."""
        samples = samples_of(model)

        def seen(_module, args):
            if model.training and samples:
                remember(*at_objects(args[0][0].detach(), samples.pop()))

        model.bbox_head.register_forward_pre_hook(seen)


def at_objects(map_: Tensor, samples) -> tuple[Tensor, Tensor]:
    """The vectors ``(N, C)`` of a map at the centers of N objects, and their labels."""
    vectors, labels = [], []
    for values, sample in zip(map_, samples, strict=True):
        boxes = sample.gt_instances.bboxes
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
        height, width = sample.pad_shape[:2]
        rows, columns = map_.shape[2:]
        x, y = x / width * columns, y / height * rows
        x, y = x.long().clamp(0, columns - 1), y.long().clamp(0, rows - 1)
        vectors.append(values[:, y, x].T)
        labels.append(sample.gt_instances.labels)
    return torch.cat(vectors), torch.cat(labels)


@MODELS.register_module()
class DetPrototypes(PrototypeTerm, DetLead):
    """1, 6: see `PrototypeTerm`."""


@MODELS.register_module()
class DetContrast(ContrastTerm, DetLead):
    """3: see `ContrastTerm`."""
