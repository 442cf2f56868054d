# A small RetinaNet on Fashion-MNIST items on photographs, from scratch.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/scenes_detection.py',
    '../_base_/schedules/scenes_schedule.py',
    '../_base_/scenes_runtime.py',
]

norm_cfg = dict(type='GN', num_groups=16)
model = dict(
    backbone=dict(
        depth=18, base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None
    ),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        num_outs=4,
        norm_cfg=norm_cfg,
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(
            octave_base_scale=2, scales_per_octave=2, strides=[8, 16, 32, 64]
        ),
    ),
    # Few and small images: more anchors count as positive.
    train_cfg=dict(assigner=dict(pos_iou_thr=0.4, neg_iou_thr=0.3)),
)
