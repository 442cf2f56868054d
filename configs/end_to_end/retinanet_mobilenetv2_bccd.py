# RetinaNet with MobileNetV2, fine-tuned from ImageNet on photographs of blood cells.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_schedule.py',
    '../_base_/scenes_runtime.py',
]

norm_cfg = dict(type='GN', num_groups=16)
model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained', checkpoint='data/pretrained/mobilenetv2_imagenet.pth'
        ),
    ),
    neck=dict(
        in_channels=[24, 32, 96, 320], out_channels=64, num_outs=4, norm_cfg=norm_cfg
    ),
    bbox_head=dict(
        num_classes=3,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[8, 16, 32, 64]),
    ),
)
