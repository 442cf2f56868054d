_base_ = '../end_to_end/resnet32_fashion.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        partition=dict(type='UniformPartition', num_modules=4),
        aux_head=dict(
            type='MomentumHead',
            head=dict(type='InfoProHead', lambda1=(6.0, 1.0), lambda2=(0.0, 2.0)),
        ),
    ),
)
# It holds the image that the heads reconstruct, and needs no statistics of it.
default_hooks = dict(memory_bank=dict(type='MemoryBankHook', long_term=False))
