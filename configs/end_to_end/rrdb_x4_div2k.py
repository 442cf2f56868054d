_base_ = [
    'mmagic::esrgan/esrgan_psnr-x4c64b23g32_1xb16-1000k_div2k.py',
    '../_base_/datasets/b100_urban100.py',
]
experiment_name = 'rrdb_x4_div2k'
work_dir = f'./work_dirs/{experiment_name}'

test_dataloader = _base_.test_dataloader + _base_.more_dataloaders.x4
test_evaluator = _base_.test_evaluator + _base_.more_evaluators.x4
