_base_ = 'mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py'
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(in_channels=[2048, 1024, 512]),
)
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        partition=dict(type='StagePartition'), aux_head=dict(type='MANHead')
    ),
)
default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))
