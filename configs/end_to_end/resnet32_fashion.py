# ResNet-32 on 12,000 images of Fashion-MNIST (make_fashion), from scratch.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='CIFARResNet', depth=32, in_channels=1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
data_preprocessor = dict(num_classes=10, mean=[72.94], std=[90.02], to_rgb=False)

data_root = 'data/fashion'
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    persistent_workers=False,  # mmpretrain's script would set it
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='FashionMNIST',
        data_root=data_root,
        split='train',
        download=False,
        indices=12000,
        pipeline=[
            dict(type='RandomCrop', crop_size=28, padding=2),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='FashionMNIST',
        data_root=data_root,
        split='test',
        test_mode=True,
        download=False,
        pipeline=[dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=5)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
)
# Over all epochs, however many there are.
param_scheduler = dict(type='CosineAnnealingLR', convert_to_iter_based=True)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=1),
    resume=dict(type='ResumeHook'),
)
randomness = dict(seed=0)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
