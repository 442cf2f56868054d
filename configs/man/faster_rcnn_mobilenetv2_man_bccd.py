_base_ = '../end_to_end/faster_rcnn_mobilenetv2_bccd.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
)
default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))
