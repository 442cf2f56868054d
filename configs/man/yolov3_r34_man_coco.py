_base_ = 'mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py'
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=34,
        out_indices=(1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet34'),
    ),
    neck=dict(in_channels=[512, 256, 128]),
)
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
)
default_hooks = dict(
    memory_bank=dict(type='MemoryBankHook'),
    resume=dict(type='ResumeHook'),
    checkpoint=dict(type='SafeCheckpointHook'),
)
