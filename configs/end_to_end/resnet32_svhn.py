# ResNet-32 on SVHN (format 2, without the extra images), from scratch.
_base_ = './resnet32_cifar10.py'

data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)
data_root = 'data/svhn'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='SVHN',
        data_root=data_root,
        split='train',
        pipeline=[
            dict(type='RandomCrop', crop_size=32, padding=2),
            dict(type='PackInputs'),
        ],
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='SVHN',
        data_root=data_root,
        split='test',
        pipeline=[dict(type='PackInputs')],
    )
)
test_dataloader = val_dataloader
