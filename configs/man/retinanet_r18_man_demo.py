_base_ = '../end_to_end/retinanet_r18_demo.py'
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
