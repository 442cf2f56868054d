_base_ = '../end_to_end/retinanet_r18_scenes.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        # Weight on boxes, for from scratch a module has to learn to find things first.
        aux_head=dict(type='MANHead', cls_weight=0.25),
    ),
)
default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))
