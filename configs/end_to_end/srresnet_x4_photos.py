# A small SRResNet on photographs (make_photos), from scratch.
_base_ = './edsr_x4_photos.py'
experiment_name = 'srresnet_x4_photos'
work_dir = f'./work_dirs/{experiment_name}'

model = dict(
    generator=dict(
        _delete_=True,
        type='MSRResNet',
        in_channels=3,
        out_channels=3,
        mid_channels=32,
        num_blocks=8,
        upscale_factor=4,
    )
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))  # at 2e-3, it does not train
