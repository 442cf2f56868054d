# From scratch in minutes on two CPU cores. For another number of iterations set
# train_cfg.max_iters and train_cfg.val_interval.
max_iters = 900
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
# One cycle. OneCycleLR of mmengine gives all parameters the same rate, whatever
# aux_lr_mult or paramwise_cfg say; these two keep the ratios.
warmup_iters = 200
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, by_epoch=False, end=warmup_iters),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=warmup_iters),  # to the end
]
