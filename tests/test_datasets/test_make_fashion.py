"""make_fashion unpacks IDX files to where mmpretrain's data set class reads them."""

import gzip
import json
import struct

import numpy as np
import pytest
from scripts import run_script

from man_mm.datasets import make_fashion as tool

SHAPES = {
    'train-images-idx3-ubyte': (6, 28, 28),
    'train-labels-idx1-ubyte': (6,),
    't10k-images-idx3-ubyte': (4, 28, 28),
    't10k-labels-idx1-ubyte': (4,),
}


def idx(shape, seed):
    values = np.random.default_rng(seed).integers(10, size=shape, dtype=np.uint8)
    return struct.pack(f'>HBB{len(shape)}I', 0, 8, len(shape), *shape), values


def write(folder, compressed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        head, values = idx(shape, seed)
        data = head + values.tobytes()
        if compressed:
            (folder / f'{name}.gz').write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def make(out, **kwargs):
    return tool.make_fashion(out, shapes=SHAPES, **kwargs)


@pytest.mark.parametrize('compressed', [True, False])
def test_mmpretrain_reads_it(compressed, tmp_path):
    from mmpretrain.datasets import FashionMNIST

    out = make(tmp_path / 'out', folder=write(tmp_path / 'in', compressed))
    for seed, test in ((0, False), (2, True)):
        split = 'test' if test else 'train'
        dataset = FashionMNIST(str(out), split=split, test_mode=test, download=False)
        images = [dataset.get_data_info(i)['img'] for i in range(len(dataset))]
        labels = [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))]
        shapes = list(SHAPES.values())
        assert np.array_equal(images, idx(shapes[seed], seed)[1])
        assert np.array_equal(labels, idx(shapes[seed + 1], seed + 1)[1])


def test_of_a_package_and_only_once(tmp_path, capsys):
    write(tmp_path / tool.PLACE)
    out = make(tmp_path / 'out', root=tmp_path)
    assert json.loads((out / 'dataset.json').read_text())['license'] == 'MIT'
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make(out, root=tmp_path)
    assert 'nothing to do' in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / 't10k-labels-idx1-ubyte').unlink()  # control
    make(out, root=tmp_path)
    assert len(list(out.iterdir())) == 5


def test_images_are_reduced(tmp_path):
    from mmpretrain.datasets import FashionMNIST

    out = make(tmp_path / 'out', folder=write(tmp_path / 'in'), side=14)
    dataset = FashionMNIST(str(out), split='train', download=False)
    small = np.stack([dataset.get_data_info(i)['img'] for i in range(6)])
    full = idx(SHAPES['train-images-idx3-ubyte'], 0)[1]
    means = full.reshape(6, 14, 2, 14, 2).mean((2, 4))
    assert small.shape == (6, 14, 14)
    assert np.abs(small - means).max() <= 0.5
    with pytest.raises(ValueError, match='--side must be from 4 to 28'):
        make(tmp_path / 'other', folder=tmp_path / 'in', side=29)


def test_a_missing_file(tmp_path):
    (write(tmp_path / 'in') / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(FileNotFoundError, match='t10k-labels.*dpkg -x.*--folder'):
        make(tmp_path / 'out', folder=tmp_path / 'in')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('damage', ['gzip', 'short', 'other'])
def test_a_damaged_file(damage, tmp_path):
    path = write(tmp_path / 'in') / 'train-images-idx3-ubyte.gz'
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(
        {
            'gzip': path.read_bytes()[:40],
            'short': gzip.compress(data[:-1]),
            'other': gzip.compress(b'x' * len(data)),
        }[damage]
    )
    with pytest.raises((ValueError, OSError), match='is damaged|not that of Fashion'):
        make(tmp_path / 'out', folder=tmp_path / 'in')


def test_other_files_are_not_touched(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'mine.txt').touch()
    with pytest.raises(ValueError, match='holds other files'):
        make(out, folder=write(tmp_path / 'in'))


def test_the_command_line(tmp_path):
    with pytest.raises(SystemExit, match='make_fashion: .*is missing'):
        run_script(
            'make_fashion', '--out', str(tmp_path / 'out'), '--folder', str(tmp_path)
        )
