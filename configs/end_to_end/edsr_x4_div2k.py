_base_ = 'mmagic::edsr/edsr_x4c64b16_1xb16-300k_div2k.py'
experiment_name = 'edsr_x4_div2k'
work_dir = f'./work_dirs/{experiment_name}'

# B100 and Urban100, beside mmagic's Set5, Set14 and DIV2K.
set5, set5_evaluator = _base_.test_dataloader[0], _base_.test_evaluator[0]
test_dataloader = _base_.test_dataloader + [
    dict(set5, dataset=dict(set5.dataset, data_root=f'data/{name}'))
    for name in ('B100', 'Urban100')
]
test_evaluator = _base_.test_evaluator + [
    dict(
        set5_evaluator,
        metrics=[dict(metric, prefix=name) for metric in set5_evaluator.metrics],
    )
    for name in ('B100', 'Urban100')
]
