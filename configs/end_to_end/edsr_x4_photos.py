# The small EDSR of edsr_x2_photos.py, four times as large instead of twice.
_base_ = './edsr_x2_photos.py'
experiment_name = 'edsr_x4_photos'
work_dir = f'./work_dirs/{experiment_name}'

scale = 4
model = dict(generator=dict(upscale_factor=scale))
train_dataloader = _base_.train_dataloader
train_dataloader.dataset.data_prefix.img = f'DIV2K_train_LR_bicubic/X{scale}_sub'
train_dataloader.dataset.pipeline[2].dictionary.scale = scale
train_dataloader.dataset.pipeline[3].gt_patch_size = 64

val_dataloader = _base_.val_dataloader
val_dataloader.dataset.data_prefix.img = f'DIV2K_valid_LR_bicubic/X{scale}'
val_evaluator = _base_.val_evaluator
for metric in val_evaluator.metrics:
    metric.crop_border = scale
test_dataloader = [val_dataloader]
test_evaluator = [val_evaluator]
