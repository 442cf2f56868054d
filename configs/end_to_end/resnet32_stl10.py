# ResNet-32 on the labelled images of STL-10, from scratch.
_base_ = './resnet32_cifar10.py'

data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)
data_root = 'data/stl10_binary'
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        _delete_=True,
        type='STL10',
        data_root=data_root,
        split='train',
        pipeline=[
            dict(type='RandomCrop', crop_size=96, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=250,
    dataset=dict(
        _delete_=True,
        type='STL10',
        data_root=data_root,
        split='test',
        pipeline=[dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.1))
auto_scale_lr = dict(base_batch_size=128)
