"""SVHN and STL-10 are read from files of their real formats."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from scipy.io import savemat

SHAPES = {'SVHN': (32, 32, 3), 'STL10': (96, 96, 3)}
LABELS = np.array([3, 0, 9, 7, 1])
PIPELINE = [dict(type='mmpretrain.PackInputs')]


def write_svhn(folder, split, images, labels):
    content = dict(
        X=images.transpose(1, 2, 3, 0), y=np.where(labels, labels, 10)[:, None]
    )
    savemat(folder / f'{split}_32x32.mat', content)


def write_stl10(folder, split, images, labels):
    images.transpose(0, 3, 2, 1).tofile(folder / f'{split}_X.bin')
    (labels + 1).astype(np.uint8).tofile(folder / f'{split}_y.bin')


WRITE = dict(SVHN=write_svhn, STL10=write_stl10)


@pytest.fixture(params=SHAPES)
def name(request):
    return request.param


def images_of(name, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(len(LABELS), *SHAPES[name]), dtype=np.uint8)


def build(name, folder, **kwargs):
    init_default_scope('mmpretrain')
    cfg = dict(type=name, data_root=str(folder), pipeline=PIPELINE, **kwargs)
    return DATASETS.build(cfg)


def test_images_and_labels(name, tmp_path):
    for seed, split in enumerate(('train', 'test')):
        WRITE[name](tmp_path, split, images_of(name, seed), LABELS)
    for seed, split in enumerate(('train', 'test')):
        items = list(build(name, tmp_path, split=split))
        for item, image, label in zip(
            items, images_of(name, seed), LABELS, strict=True
        ):
            wanted = torch.from_numpy(image).permute(2, 0, 1)
            assert torch.equal(item['inputs'], wanted)
            assert not torch.equal(item['inputs'], wanted.mT)  # control
            assert item['data_samples'].gt_label.tolist() == [label]


def test_a_subset(name, tmp_path):
    WRITE[name](tmp_path, 'train', images_of(name, 0), LABELS)
    dataset = build(name, tmp_path, indices=2)
    assert len(dataset) == 2 and len(dataset.metainfo['classes']) == 10


def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match='download them from http') as info:
        build(name, tmp_path, split='test')
    for part in ('test_', str(tmp_path), name):
        assert part in str(info.value)


def test_an_unknown_split(name, tmp_path):
    with pytest.raises(ValueError, match="dataset.split of .* got 'extra'"):
        build(name, tmp_path, split='extra')


@pytest.mark.parametrize('name', ['resnet32_svhn', 'resnet32_stl10'])
def test_configs_load_them(name, tmp_path):
    kind = {'svhn': 'SVHN', 'stl10': 'STL10'}[name.partition('_')[2]]
    cfg = Config.fromfile(f'configs/end_to_end/{name}.py')
    for loader, split in (
        (cfg.train_dataloader, 'train'),
        (cfg.val_dataloader, 'test'),
    ):
        WRITE[kind](tmp_path, split, images_of(kind, 0), LABELS)
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(tmp_path)
        batch = next(iter(Runner.build_dataloader(loader, seed=0)))
        assert batch['inputs'][0].shape == (3, *SHAPES[kind][:2])
