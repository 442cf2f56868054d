# A small EDSR on photographs (make_photos), from scratch.
_base_ = 'mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py'
experiment_name = 'edsr_x2_photos'
work_dir = f'./work_dirs/{experiment_name}'

scale = 2
model = dict(generator=dict(mid_channels=32, num_blocks=8))

data_root = 'data/photos'
load_pair = [
    dict(type='LoadImageFromFile', key='img', channel_order='rgb'),
    dict(type='LoadImageFromFile', key='gt', channel_order='rgb'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        ann_file='',
        data_root=data_root,
        pipeline=[
            *load_pair,
            dict(type='SetValues', dictionary=dict(scale=scale)),
            dict(type='PairedRandomCrop', gt_patch_size=48),
            dict(
                type='Flip',
                keys=['img', 'gt'],
                flip_ratio=0.5,
                direction='horizontal',
            ),
            dict(type='Flip', keys=['img', 'gt'], flip_ratio=0.5, direction='vertical'),
            dict(type='RandomTransposeHW', keys=['img', 'gt'], transpose_ratio=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
photos_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BasicImageDataset',
        metainfo=dict(dataset_type='photos', task_name='sisr'),
        data_root=data_root,
        data_prefix=dict(img=f'DIV2K_valid_LR_bicubic/X{scale}', gt='DIV2K_valid_HR'),
        pipeline=[*load_pair, dict(type='PackInputs')],
    ),
)
photos_evaluator = dict(
    type='Evaluator',
    metrics=[
        dict(type='PSNR', crop_border=scale),
        dict(type='SSIM', crop_border=scale),
    ],
)
val_dataloader = dict(_delete_=True, **photos_dataloader)
val_evaluator = dict(_delete_=True, **photos_evaluator)
test_dataloader = [photos_dataloader]
test_evaluator = [photos_evaluator]

max_iters = 1200
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=max_iters - 50,
        by_epoch=False,
        begin=50,
        end=max_iters,
    ),
]
default_hooks = dict(
    checkpoint=dict(interval=400, max_keep_ckpts=1, out_dir=None, save_best=None),
    logger=dict(interval=50),
)
log_processor = dict(window_size=50)
custom_hooks = []
randomness = dict(seed=0)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
