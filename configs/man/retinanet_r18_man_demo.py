_base_ = '../end_to_end/retinanet_r18_demo.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        partition=dict(type='StagePartition'),
        # Digits are easily found and hard to tell apart: more weight on classes.
        aux_head=dict(type='MANHead', cls_weight=1.0),
    ),
)
default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))
