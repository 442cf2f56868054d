"""The real ``mim`` command, from training to testing with the stock config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from packages import ON_FORKS
from tiny_data import tiny_fashion

from man_mm.datasets.make_digits import make_digits
from man_mm.datasets.make_photos import make_photos
from man_mm.stack import find_distributions

MIM = Path(sys.executable).with_name('mim')
DEMO = 'configs/{}/retinanet_r18_{}demo.py'


@pytest.fixture
def digits(tmp_path):
    return Path(make_digits(tmp_path / 'digits', 8, 4, 64, 0))


def data_options(digits):
    options = [
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        f'train_dataloader.dataset.data_root={digits}/',
        'train_dataloader.dataset.ann_file=annotations/instances_train.json',
        'train_dataloader.dataset.data_prefix.img=train/',
    ]
    for split in ('val', 'test'):
        options += [
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
            f'{split}_dataloader.dataset.data_root={digits}/',
            f'{split}_dataloader.dataset.ann_file=annotations/instances_val.json',
            f'{split}_dataloader.dataset.data_prefix.img=val/',
            f'{split}_evaluator.ann_file={digits}/annotations/instances_val.json',
        ]
    return options


def mim(command, config, work_dir, *options, args=(), package='mmdet', gpus=0):
    if ON_FORKS and package == 'man_mm':  # whose tools their mim does not find
        parts = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        parts += ['--nproc-per-node', gpus, '-m', 'man_mm', command, config]
    else:
        package = next(iter(find_distributions(package)), package)
        parts = [MIM, command, package, config, '--gpus', gpus]
    parts += ['--work-dir', work_dir, *args, '--cfg-options', *options]
    done = subprocess.run(
        [str(part) for part in parts],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000]
    return output


def scalars(work_dir):
    path = max(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_then_test_with_the_stock_config(digits, tmp_path):
    options = [
        *data_options(digits),
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=4',
        'default_hooks.checkpoint.interval=4',
        'default_hooks.logger.interval=1',
        'train_dataloader.batch_size=2',
        'model.test_cfg.score_thr=0',  # hardly trained, it still predicts something
        f'val_evaluator.outfile_prefix={tmp_path}/trained',
    ]
    man, stock = tmp_path / 'man', tmp_path / 'stock'
    mim('train', DEMO.format('man', 'man_'), man, *options)
    rows = scalars(man)
    train = [row for row in rows if 'loss' in row]
    keys = {f'module{i}/{k}' for i in (1, 2, 3) for k in ('loss', 'grad_norm')}
    assert all(keys | {'bank_bytes'} <= row.keys() for row in train)
    tested = [
        *data_options(digits),
        'model.test_cfg.score_thr=0',
        f'test_evaluator.outfile_prefix={tmp_path}/tested',
    ]
    checkpoint = ['--checkpoint', man / 'iter_4.pth']
    mim('test', DEMO.format('end_to_end', ''), stock, *tested, args=checkpoint)
    found = json.loads((tmp_path / 'trained.bbox.json').read_text())
    assert found and found == json.loads((tmp_path / 'tested.bbox.json').read_text())
    scores = json.loads(max(stock.glob('*/2*.json')).read_text())
    last = [row for row in rows if 'coco/bbox_mAP' in row][-1]
    assert scores['coco/bbox_mAP'] == last['coco/bbox_mAP']
    # A stock checkpoint starts a run by local learning.
    output = mim(
        'train', DEMO.format('man', 'man_'), tmp_path / 'again', *options,
        f'load_from={man}/iter_4.pth',
    )  # fmt: skip
    assert 'Load checkpoint from' in output and 'unexpected key' not in output


def test_two_processes_on_a_cpu_and_mixed_precision(digits, tmp_path):
    """``--launcher pytorch`` and ``--amp``, as on a machine with GPUs.

    On CPUs mmdet's own script selects a GPU; that of this package does not.
    """
    output = mim(
        'train', DEMO.format('man', 'man_'), tmp_path,
        *data_options(digits),
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
        'default_hooks.logger.interval=1',
        'train_dataloader.batch_size=2',
        'model.test_cfg.score_thr=0',  # hardly trained, it still predicts something
        args=['--launcher', 'pytorch', '--amp'],
        package='man_mm',
        gpus=2,
    )  # fmt: skip
    assert 'Distributed training: True' in output
    keys = {f'module{i}/{k}' for i in (1, 2, 3) for k in ('loss', 'grad_norm')}
    rows = scalars(tmp_path)
    assert all(keys <= row.keys() for row in rows if 'loss' in row)
    assert any('coco/bbox_mAP' in row for row in rows)
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    assert len(saved['optimizer']['loss_scalers']) == 4  # mixed precision was on


def test_stock_config_by_options_alone(digits, tmp_path):
    """The command of the README, on small images under COCO's class names.

    It resumes with mmengine's hooks alone.
    """
    names = 'person bicycle car motorcycle airplane bus train truck boat bench'.split()
    for path in (digits / 'annotations').glob('*.json'):
        coco = json.loads(path.read_text())
        for category, name in zip(coco['categories'], names, strict=True):
            category['name'] = name
        path.write_text(json.dumps(coco))
    options = [
        'optim_wrapper.type=man_mm.LocalLearningOptimWrapper',
        'optim_wrapper.constructor=man_mm.LocalLearningOptimWrapperConstructor',
        'default_hooks.memory_bank.type=man_mm.MemoryBankHook',
        *data_options(digits),
        'train_dataloader.dataset.indices=2',
        'train_dataloader.dataset.pipeline.2.scale=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)',
        'val_dataloader.dataset.indices=1',
        'model.backbone.init_cfg=None',
        'default_hooks.logger.interval=1',
    ]
    for epoch, args in ((1, []), (2, ['--resume'])):
        output = mim(
            'train', 'retinanet_r50_fpn_1x_coco.py', tmp_path / 'run', *options,
            f'train_cfg.max_epochs={epoch}', args=args,
        )  # fmt: skip
        row = [row for row in scalars(tmp_path / 'run') if 'loss' in row][-1]
        assert {'module1/loss', 'module2/loss'} <= row.keys()
        assert ('resumed epoch: 1, iter: 1' in output) == (epoch == 2)


@pytest.mark.slow
@pytest.mark.usefixtures('mmagic')
def test_super_resolution_with_mmagic(tmp_path):
    """Trained by the config for DIV2K, tested by a config without local learning."""
    photos = make_photos(tmp_path / 'photos', scales=(2,))
    validation = [
        f'dataset.data_root={photos}',
        'dataset.data_prefix.img=DIV2K_valid_LR_bicubic/X2',
        'dataset.data_prefix.gt=DIV2K_valid_HR',
        'num_workers=0',
    ]
    narrow = ['model.generator.mid_channels=8', 'model.generator.num_blocks=4']
    man, stock = tmp_path / 'man', tmp_path / 'stock'
    mim(
        'train', 'configs/man/edsr_x2_man_div2k.py', man,
        *narrow,
        f'train_dataloader.dataset.data_root={photos}',
        'train_dataloader.num_workers=0',
        'train_dataloader.batch_size=2',
        *(f'val_dataloader.{option}' for option in validation),
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        f'default_hooks.checkpoint.out_dir={man}',
        'default_hooks.checkpoint.interval=2',
        package='mmagic',
    )  # fmt: skip
    rows = scalars(man)
    keys = {f'module{i}/{k}' for i in (1, 2, 3) for k in ('loss', 'grad_norm')}
    assert keys | {'bank_bytes'} <= rows[0].keys()
    (checkpoint,) = man.rglob('iter_2.pth')
    mim(
        'test', 'configs/end_to_end/edsr_x2_photos.py', stock,
        *narrow,
        *(f'test_dataloader.0.{option}' for option in validation),
        args=['--checkpoint', checkpoint],
        package='mmagic',
    )  # fmt: skip
    scores = json.loads(max(stock.glob('*/2*.json')).read_text())
    trained = [row for row in rows if 'PSNR' in row][-1]
    assert scores['PSNR'] == trained['PSNR'] > 5


@pytest.mark.slow
def test_classification_with_mmpretrain(tmp_path):
    """Trained by local learning, tested by the config without it."""
    data = tiny_fashion(tmp_path / 'original')
    roots = [f'{name}_dataloader.dataset.data_root={data}' for name in ('val', 'test')]
    options = [
        f'train_dataloader.dataset.data_root={data}',
        'train_dataloader.dataset.indices=8',
        *roots,
        'train_dataloader.batch_size=4',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
    ]
    man, stock = tmp_path / 'man', tmp_path / 'stock'
    mim(
        'train', 'configs/man/resnet32_k4_man_fashion.py', man, *options,
        package='mmpretrain',
    )  # fmt: skip
    rows = scalars(man)
    keys = {f'module{i}/{k}' for i in (1, 2, 3) for k in ('loss', 'grad_norm')}
    assert keys | {'bank_bytes'} <= rows[0].keys()
    mim(
        'test', 'configs/end_to_end/resnet32_fashion.py', stock, *roots,
        args=['--checkpoint', man / 'epoch_1.pth'], package='mmpretrain',
    )  # fmt: skip
    scores = json.loads(max(stock.glob('*/2*.json')).read_text())
    assert scores['accuracy/top1'] == rows[-1]['accuracy/top1']


def test_stock_classifier_by_options_alone(tmp_path):
    """An ImageNet config of mmpretrain, on images in ImageNet's folders."""
    rng, data = np.random.default_rng(0), tmp_path / 'imagenet'
    (data / 'meta').mkdir(parents=True)
    for split in ('train', 'val'):
        (data / split).mkdir()
        (data / 'meta' / f'{split}.txt').write_text('0.png 3\n1.png 7\n')
        for index in range(2):
            image = rng.integers(256, size=(48, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(data / split / f'{index}.png'), image)
    loaders = [
        f'{name}_dataloader.{option}'
        for name in ('train', 'val', 'test')
        for option in (
            f'dataset.data_root={data}',
            'batch_size=2',
            'num_workers=0',
            'persistent_workers=False',
        )
    ]
    mim(
        'train', 'resnet18_8xb32_in1k.py', tmp_path / 'run',
        'optim_wrapper.type=man_mm.LocalLearningOptimWrapper',
        'optim_wrapper.constructor=man_mm.LocalLearningOptimWrapperConstructor',
        'default_hooks.memory_bank.type=man_mm.MemoryBankHook',
        *loaders,
        'train_dataloader.dataset.pipeline.1.scale=64',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        package='mmpretrain',
    )  # fmt: skip
    row = [row for row in scalars(tmp_path / 'run') if 'loss' in row][-1]
    assert {'module1/loss', 'module2/loss', 'module3/loss'} <= row.keys()
