_base_ = '../end_to_end/resnet32_fashion.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        partition=dict(type='UniformPartition', num_modules=4),
        aux_head=dict(type='MANHead', channels=32, norm='BN'),
    ),
)
default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))
