"""Small backbones of several families, as mmdet, mmpretrain and man_mm have them."""

import copy
from unittest import mock

import torch
from mmdet.models.backbones import Darknet
from mmengine.registry import MODELS, init_default_scope
from torch import nn

SWIN = dict(window_size=2, drop_path_rate=0.0, out_indices=(0, 1, 2, 3))
SMALL_CSP = dict(widen_factor=0.125, deepen_factor=0.33)
FAMILIES = {
    'cifar-resnet': dict(type='CIFARResNet', depth=14, base_channels=8),
    'vgg': dict(
        type='mmpretrain.VGG',
        depth=11,
        norm_cfg=dict(type='BN'),
        out_indices=(1, 4),
    ),
    'convnext': dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 2, 1, 1], channels=[8, 8, 16, 16]),
        out_indices=(0, 2, 3),
        gap_before_final_norm=False,
    ),
    'swin': dict(
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[2] * 4),
        img_size=64,
        use_abs_pos_embed=True,
        **SWIN,
    ),
    'mmdet-swin': dict(
        type='mmdet.SwinTransformer',
        embed_dims=8,
        depths=[1, 2, 1, 1],
        num_heads=[2] * 4,
        **SWIN,
    ),
    'vit': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=8, num_layers=5, num_heads=2, feedforward_channels=8),
        img_size=64,
        out_indices=[2, 4],
        out_type='featmap',
    ),
    'darknet': dict(type='mmdet.Darknet', depth=13),
    'csp-darknet': dict(type='mmdet.CSPDarknet', **SMALL_CSP),
    'cspnext': dict(type='mmdet.CSPNeXt', **SMALL_CSP),
    'ssd-vgg': dict(type='mmdet.SSDVGG', depth=11, out_feature_indices=(14, 24)),
}


# mmdet has only the one with 53 layers: blocks and widths of its stages.
DARKNET = ((1, 1, 2, 1, 1), ((32, 8), (8, 8), (8, 16), (16, 16), (16, 32)))


def build(name):
    for package in ('mmdet', 'mmpretrain'):
        init_default_scope(package)
    torch.manual_seed(0)
    model = nn.Module()
    with mock.patch.object(Darknet, 'arch_settings', {13: DARKNET}):
        model.backbone = MODELS.build(copy.deepcopy(FAMILIES[name]))
    return model.train()
