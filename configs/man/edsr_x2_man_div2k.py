_base_ = '../end_to_end/edsr_x2_div2k.py'
experiment_name = 'edsr_x2_man_div2k'
work_dir = f'./work_dirs/{experiment_name}'
custom_imports = dict(
    imports=['man_mm', 'man_mm.backbones.mmagic_models'], allow_failed_imports=False
)
optim_wrapper = dict(
    type='LocalLearningOptimWrapper',
    constructor='LocalLearningOptimWrapperConstructor',
)
default_hooks = dict(
    memory_bank=dict(type='MemoryBankHook'),
    resume=dict(type='ResumeHook'),
    checkpoint=dict(type='SafeCheckpointHook'),
)
