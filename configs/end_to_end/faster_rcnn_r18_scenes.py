# A small Faster R-CNN on Fashion-MNIST items on photographs, from scratch.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/scenes_detection.py',
    '../_base_/schedules/scenes_schedule.py',
    '../_base_/scenes_runtime.py',
]

norm_cfg = dict(type='GN', num_groups=16)
model = dict(
    backbone=dict(
        depth=18, base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[3]),
    ),
    roi_head=dict(
        # Levels by size, as for the larger images of COCO.
        bbox_roi_extractor=dict(out_channels=64, finest_scale=14),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
    ),
    # Few objects an image: fewer proposals.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

max_iters = 600  # its steps take longer than RetinaNet's
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
