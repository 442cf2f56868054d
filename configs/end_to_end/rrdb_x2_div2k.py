# mmagic has RRDB x4 only: this is its EDSR x2 with the other network.
_base_ = './edsr_x2_div2k.py'
experiment_name = 'rrdb_x2_div2k'
work_dir = f'./work_dirs/{experiment_name}'

model = dict(
    generator=dict(
        _delete_=True,
        type='RRDBNet',
        in_channels=3,
        out_channels=3,
        mid_channels=64,
        num_blocks=23,
        growth_channels=32,
        upscale_factor=2,
    )
)
