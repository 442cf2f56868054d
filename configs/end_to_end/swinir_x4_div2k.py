_base_ = [
    'mmagic::swinir/swinir_x4s48w8d6e180_8xb4-lr2e-4-500k_div2k.py',
    '../_base_/datasets/b100_urban100.py',
]
experiment_name = 'swinir_x4_div2k'
work_dir = f'./work_dirs/{experiment_name}'

test_dataloader = _base_.test_dataloader + _base_.more_dataloaders.x4
test_evaluator = _base_.test_evaluator + _base_.more_evaluators.x4_y
