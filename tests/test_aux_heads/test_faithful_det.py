"""What faithful heads cannot copy, and the targets that they leave alone."""

import pytest
import torch
from conftest import (
    build_detector,
    build_wrapper,
    detection_targets,
    detector_config,
)

from man_mm.aux_heads.faithful_det import copy_targets


def other_backbone(**backbone):
    cfg = detector_config('retinanet', 18)
    cfg.model.backbone = backbone
    widths = [8, 16, 32, 64] if 'embed_dims' in backbone else [512, 1024]
    cfg.model.neck.update(in_channels=widths, start_level=0)
    return build_detector(cfg)


SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=[1] * 4,
    num_heads=[2] * 4,
    window_size=2,
)


SSD = dict(type='SSDVGG', depth=11, out_feature_indices=(14, 24))


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (SWIN, "those of SwinTransformer work on tokens: set aux_head.mode='light'"),
        (SSD, "between 'backbone.features.17' and 'backbone.features.24' channels or"),
    ],
)
def test_backbones_that_faithful_heads_cannot_copy(backbone, message):
    model = other_backbone(**backbone)
    with pytest.raises(ValueError, match=message):
        build_wrapper(model, aux_head=dict(mode='faithful'))
    build_wrapper(model)  # control


def test_a_neck_that_reads_something_else_than_ends_of_stages():
    model = build_detector(detector_config('retinanet', 18))
    forward = model.backbone.forward
    model.backbone.forward = lambda x: [map_[:, :3] for map_ in forward(x)]
    with pytest.raises(ValueError, match='ResNet returns maps .*no stage ends with'):
        build_wrapper(model, aux_head=dict(mode='faithful'))


def test_faithful_heads_keep_the_targets_as_they_are():
    """RTMDet-Ins replaces masks by tensors, which its own loss cannot read again."""
    samples = detection_targets(masks=True)
    copies = copy_targets(samples)
    for sample in copies:
        sample.gt_instances.masks = torch.zeros(3, 64, 64)
        sample.gt_instances = sample.gt_instances[:1]
        sample.set_metainfo(dict(img_shape=(1, 1)))
    for before, after in zip(detection_targets(masks=True), samples, strict=True):
        assert len(after.gt_instances) == 3
        assert (after.gt_instances.masks.masks == before.gt_instances.masks.masks).all()
        assert after.img_shape == before.img_shape == (64, 64)
