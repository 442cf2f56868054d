# mmagic has SRResNet x4 only: this is its EDSR x3 with the other network.
_base_ = './edsr_x3_div2k.py'
experiment_name = 'srresnet_x3_div2k'
work_dir = f'./work_dirs/{experiment_name}'

model = dict(
    generator=dict(
        _delete_=True,
        type='MSRResNet',
        in_channels=3,
        out_channels=3,
        mid_channels=64,
        num_blocks=16,
        upscale_factor=3,
    )
)
