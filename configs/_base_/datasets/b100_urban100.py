# B100 and Urban100, by scale: test sets beside the Set5, Set14 and DIV2K that mmagic's
# configs have. Those on the Y channel end in _y.
more_dataloaders = {
    f'x{scale}': [
        dict(
            num_workers=4,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='BasicImageDataset',
                metainfo=dict(dataset_type=name.lower(), task_name='sisr'),
                data_root=f'data/{name}',
                data_prefix=dict(img=f'LRbicx{scale}', gt='GTmod12'),
                pipeline=[
                    *(
                        dict(
                            type='LoadImageFromFile',
                            key=key,
                            color_type='color',
                            channel_order='rgb',
                            imdecode_backend='cv2',
                        )
                        for key in ('img', 'gt')
                    ),
                    dict(type='PackInputs'),
                ],
            ),
        )
        for name in ('B100', 'Urban100')
    ]
    for scale in (2, 3, 4)
}
more_evaluators = {
    f'x{scale}{suffix}': [
        dict(
            type='Evaluator',
            metrics=[
                dict(type=metric, crop_border=scale, prefix=name, **channel)
                for metric in ('PSNR', 'SSIM')
            ],
        )
        for name in ('B100', 'Urban100')
    ]
    for scale in (2, 3, 4)
    for suffix, channel in (('', {}), ('_y', dict(convert_to='Y')))
}
