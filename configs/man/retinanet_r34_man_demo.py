_base_ = '../end_to_end/retinanet_r34_demo.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        # Where `plan_partition --num-modules 3` cuts.
        partition=dict(
            type='CutPartition', cuts=['backbone.layer1.1', 'backbone.layer3.3']
        ),
    ),
)
default_hooks = dict(
    memory_bank=dict(type='MemoryBankHook'),
    resume=dict(type='ResumeHook'),
    checkpoint=dict(type='SafeCheckpointHook'),
)
