_base_ = 'yolov3_r34_man_coco.py'
model = dict(
    backbone=dict(
        depth=50,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(in_channels=[2048, 1024, 512]),
)
