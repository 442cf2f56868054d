_base_ = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
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
