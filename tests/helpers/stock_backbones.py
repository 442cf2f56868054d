"""Every backbone of mmdet and mmpretrain, as small as its arguments allow."""

VIT = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=16)
FOUR = dict(embed_dims=16, depths=[1, 2, 1, 1], num_heads=[2] * 4)
THIN = dict(base_channels=8, stem_channels=8)
CSP = dict(widen_factor=0.125, deepen_factor=0.33)
PVT = dict(embed_dims=8, num_layers=[1, 2, 1, 1], num_heads=[1, 2, 2, 2])
TWINS = dict(
    embed_dims=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2],
    patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], mlp_ratios=[2] * 4,
    sr_ratios=[8, 4, 2, 1],
)  # fmt: skip
POOLS = dict(
    layers=[1, 1, 2, 1], embed_dims=[8, 16, 24, 32], mlp_ratios=[2] * 4,
    layer_scale_init_value=1e-5,
)  # fmt: skip
HRNET = {
    f'stage{count}': dict(
        num_modules=1,
        num_branches=count,
        block='BOTTLENECK' if count == 1 else 'BASIC',
        num_blocks=(1,) * count,
        num_channels=(8, 16, 32, 64)[:count],
    )
    for count in (1, 2, 3, 4)
}
TRIDENT = dict(
    depth=50, num_branch=3, test_branch_idx=1, num_stages=3,
    trident_dilations=(1, 2, 3), strides=(1, 2, 2), dilations=(1, 1, 1),
    out_indices=(2,),
)  # fmt: skip

MMDET = {
    'CSPDarknet': CSP,
    'CSPNeXt': CSP,
    'Darknet': {},
    'DetectoRS_ResNeXt': dict(depth=50, groups=32, base_width=4),
    'DetectoRS_ResNet': dict(depth=50),
    'EfficientNet': dict(arch='b0', out_indices=(3, 4, 5)),
    'HRNet': dict(extra=HRNET),
    'HourglassNet': dict(num_stacks=1),
    'MobileNetV2': dict(widen_factor=0.25),
    'PyramidVisionTransformer': PVT,
    'PyramidVisionTransformerV2': PVT,
    'RegNet': dict(arch='regnetx_400mf'),
    'Res2Net': dict(depth=50, scales=4, base_width=26, **THIN),
    'ResNeSt': dict(depth=50, **THIN),
    'ResNeXt': dict(depth=50, groups=4, base_width=4, **THIN),
    'ResNet': dict(depth=18, **THIN),
    'ResNetV1d': dict(depth=18, **THIN),
    'SSDVGG': dict(depth=11, out_feature_indices=(14, 24)),
    'SwinTransformer': dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[2] * 4),
    'TridentResNet': TRIDENT,
}
MMPRETRAIN = {
    'AlexNet': {},
    'BEiTViT': dict(arch=VIT),
    'CSPDarkNet': dict(depth=53),
    'CSPResNeXt': dict(depth=50),
    'CSPResNet': dict(depth=50),
    'Conformer': dict(arch='tiny'),
    'ConvMixer': dict(arch=dict(embed_dims=8, depth=4, patch_size=7, kernel_size=9)),
    'ConvNeXt': dict(arch=dict(depths=[1, 2, 1, 1], channels=[8, 8, 16, 16])),
    'DaViT': dict(arch=FOUR),
    'DeiT3': dict(arch=VIT),
    'DenseNet': dict(arch=dict(growth_rate=8, depths=[2] * 4, init_channels=8)),
    'DistilledVisionTransformer': dict(arch=VIT),
    'EdgeNeXt': dict(
        arch=dict(channels=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_heads=[2] * 4)
    ),
    'EfficientFormer': dict(arch='l1'),
    'EfficientNet': dict(arch='b0'),
    'EfficientNetV2': dict(arch='b0'),
    'HRNet': dict(extra=HRNET),
    'HiViT': dict(arch=dict(embed_dims=64, depths=[1, 1, 10], num_heads=4), rpe=True),
    'HorNet': dict(
        arch=dict(
            base_dim=16, depths=[1, 2, 1, 1], orders=[2, 3, 3, 3],
            dw_cfg=[dict(type='DW', kernel_size=7)] * 4,
        ),
    ),
    'InceptionV3': {},
    'LeNet5': {},
    'LeViT': dict(arch='128s'),
    'MViT': dict(arch='tiny'),
    'MixMIMTransformer': dict(arch=FOUR),
    'MlpMixer': dict(
        arch=dict(
            embed_dims=16, num_layers=4, tokens_mlp_dims=16, channels_mlp_dims=16
        )
    ),
    'MobileNetV2': dict(widen_factor=0.25),
    'MobileNetV3': {},
    'MobileOne': dict(
        arch=dict(
            num_blocks=[1, 2, 1, 1], width_factor=[0.125] * 4,
            num_conv_branches=[2] * 4, num_se_blocks=[0] * 4,
        ),
    ),
    'MobileViT': dict(arch='xx_small'),
    'PCPVT': dict(arch=TWINS),
    'PoolFormer': dict(arch=POOLS),
    'PyramidVig': dict(arch='tiny'),
    'RIFormer': dict(arch=POOLS),
    'RegNet': dict(arch='regnetx_400mf'),
    'RepLKNet': dict(
        arch=dict(
            large_kernel_sizes=[7] * 4, layers=[1, 2, 1, 1], channels=[8, 16, 24, 32],
            small_kernel=5, dw_ratio=1,
        ),
    ),
    'RepMLPNet': dict(
        arch=dict(
            channels=[8, 16, 32, 64], depths=[1, 2, 1, 1], sharesets_nums=[1, 2, 4, 8]
        )
    ),
    'RepVGG': dict(
        arch=dict(
            num_blocks=[1, 2, 1, 1], width_factor=[0.125] * 4, group_layer_map=None,
            se_cfg=None,
        ),
    ),
    'Res2Net': dict(depth=50, scales=4, base_width=26, **THIN),
    'ResNeSt': dict(depth=50, **THIN),
    'ResNeXt': dict(depth=50, groups=4, width_per_group=4, **THIN),
    'ResNet': dict(depth=18, **THIN),
    'ResNetV1c': dict(depth=18, **THIN),
    'ResNetV1d': dict(depth=18, **THIN),
    'ResNet_CIFAR': dict(depth=18, **THIN),
    'RevVisionTransformer': dict(arch='deit-tiny'),
    'SEResNeXt': dict(depth=50, groups=4, width_per_group=4, **THIN),
    'SEResNet': dict(depth=50, **THIN),
    'SVT': dict(arch=dict(**TWINS, window_sizes=[7] * 4)),
    'ShuffleNetV1': {},
    'ShuffleNetV2': dict(widen_factor=0.5),
    'SparseConvNeXt': dict(arch='atto'),
    'SparseResNet': dict(depth=50, **THIN),
    'SwinTransformer': dict(arch=FOUR),
    'SwinTransformerV2': dict(
        arch=dict(**FOUR, extra_norm_every_n_blocks=0), img_size=64, window_size=2
    ),
    'T2T_ViT': dict(
        embed_dims=32, num_layers=4,
        layer_cfgs=dict(num_heads=2, feedforward_channels=32),
    ),
    'TIMMBackbone': dict(model_name='resnet18'),
    'TNT': dict(arch='small'),
    'TinyViT': dict(
        arch=dict(channels=[8, 16, 24, 32], num_heads=[2] * 4, depths=[1, 2, 1, 1])
    ),
    'VAN': dict(
        arch=dict(
            embed_dims=[8, 16, 24, 32], depths=[1, 2, 1, 1], ffn_ratios=[2] * 4
        )
    ),
    'VGG': dict(depth=11),
    'ViTEVA02': dict(arch=VIT),
    'ViTSAM': dict(arch=dict(**VIT, global_attn_indexes=[1, 3]), window_size=2),
    'Vig': dict(arch='tiny'),
    'VisionTransformer': dict(arch=VIT),
    'XCiT': dict(
        patch_size=16, embed_dims=32, depth=4, num_heads=2, mlp_ratio=2,
        cls_attn_layers=2,
    ),
}  # fmt: skip
BACKBONES = {
    f'{package}.{name}': dict(type=f'{package}.{name}', **kwargs)
    for package, backbones in (('mmdet', MMDET), ('mmpretrain', MMPRETRAIN))
    for name, kwargs in backbones.items()
}
