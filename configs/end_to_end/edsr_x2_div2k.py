_base_ = [
    'mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py',
    '../_base_/datasets/b100_urban100.py',
]
experiment_name = 'edsr_x2_div2k'
work_dir = f'./work_dirs/{experiment_name}'

test_dataloader = _base_.test_dataloader + _base_.more_dataloaders.x2
test_evaluator = _base_.test_evaluator + _base_.more_evaluators.x2
