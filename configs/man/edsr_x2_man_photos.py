_base_ = '../end_to_end/edsr_x2_photos.py'
experiment_name = 'edsr_x2_man_photos'
work_dir = f'./work_dirs/{experiment_name}'
custom_imports = dict(
    imports=['man_mm', 'man_mm.backbones.mmagic_models'], allow_failed_imports=False
)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
    optimizer=dict(lr=4e-3),  # its best of 1e-3, 2e-3, 4e-3
)
default_hooks = dict(
    memory_bank=dict(type='MemoryBankHook'),
    resume=dict(type='ResumeHook'),
    checkpoint=dict(type='SafeCheckpointHook'),
)
