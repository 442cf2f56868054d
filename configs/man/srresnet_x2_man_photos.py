_base_ = '../end_to_end/srresnet_x2_photos.py'
experiment_name = 'srresnet_x2_man_photos'
work_dir = f'./work_dirs/{experiment_name}'
custom_imports = dict(
    imports=['man_mm', 'man_mm.backbones.mmagic_models'], allow_failed_imports=False
)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    local_learning=dict(
        partition=dict(
            type='CutPartition',
            cuts=[f'generator.trunk_net.{block}' for block in (1, 3, 5)],
        ),
        aux_head=dict(type='MANHead', channels=32),
        aux_lr_mult=6.0,
    ),
)
default_hooks = dict(
    memory_bank=dict(type='MemoryBankHook'),
    resume=dict(type='ResumeHook'),
    checkpoint=dict(type='SafeCheckpointHook'),
)
