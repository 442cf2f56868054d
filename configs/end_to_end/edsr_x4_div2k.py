_base_ = [
    'mmagic::edsr/edsr_x4c64b16_1xb16-300k_div2k.py',
    '../_base_/datasets/b100_urban100.py',
]
experiment_name = 'edsr_x4_div2k'
work_dir = f'./work_dirs/{experiment_name}'

test_dataloader = _base_.test_dataloader + _base_.more_dataloaders.x4
test_evaluator = _base_.test_evaluator + _base_.more_evaluators.x4
