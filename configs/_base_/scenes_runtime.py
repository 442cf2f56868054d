# Seeded, and resumed from the last checkpoint after a stop.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        type='SafeCheckpointHook', by_epoch=False, interval=300, max_keep_ckpts=1
    ),
    resume=dict(type='ResumeHook'),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
