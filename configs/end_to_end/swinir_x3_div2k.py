_base_ = [
    'mmagic::swinir/swinir_x3s48w8d6e180_8xb4-lr2e-4-500k_div2k.py',
    '../_base_/datasets/b100_urban100.py',
]
experiment_name = 'swinir_x3_div2k'
work_dir = f'./work_dirs/{experiment_name}'

test_dataloader = _base_.test_dataloader + _base_.more_dataloaders.x3
test_evaluator = _base_.test_evaluator + _base_.more_evaluators.x3_y
