# Faster R-CNN with MobileNetV2, fine-tuned from ImageNet on photographs of blood cells.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_schedule.py',
    '../_base_/scenes_runtime.py',
]

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
        in_channels=[24, 32, 96, 320],
        out_channels=64,
        norm_cfg=dict(type='GN', num_groups=16),
    ),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
    ),
    # Small images: fewer proposals.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
