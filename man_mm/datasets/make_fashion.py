"""Make Fashion-MNIST ready for mmpretrain without downloading anything.

The four files come from Debian's package dataset-fashion-mnist or from a folder of your
own, and are unpacked to where mmpretrain's data set class reads them: 60,000 images
for training and 10,000 for testing, 28×28 pixels, 10 classes. With --side, the images
are reduced to fewer pixels, for comparisons without a GPU. Fashion-MNIST is under the
MIT license (Zalando SE).
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

from .manifest import begin_manifest, finish_manifest, read_manifest

RECIPE = 'man_mm fashion 1'
SIDE = 28  # pixels
PACKAGE = 'dataset-fashion-mnist'
PLACE = 'usr/share/datasets/fashion-mnist'
SHAPES = {
    'train-images-idx3-ubyte': (60000, 28, 28),
    'train-labels-idx1-ubyte': (60000,),
    't10k-images-idx3-ubyte': (10000, 28, 28),
    't10k-labels-idx1-ubyte': (10000,),
}


def _read(folder, name, fix):
    """Return the unpacked content of a file, compressed or not."""
    for path in (folder / f'{name}.gz', folder / name):
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
            return gzip.decompress(data) if path.suffix == '.gz' else data
        except (OSError, EOFError, zlib.error) as error:
            raise OSError(f'{path} is damaged ({error}): {fix}') from error
    raise FileNotFoundError(f'{folder / name}.gz is missing: {fix}')


def idx_head(shape):
    """Return the beginning of an IDX file of unsigned bytes."""
    return struct.pack(f'>HBB{len(shape)}I', 0, 8, len(shape), *shape)


def _check(name, data, shape):
    """Refuse what is no IDX file of unsigned bytes of this shape."""
    head = idx_head(shape)
    if not data.startswith(head) or len(data) != len(head) + math.prod(shape):
        raise ValueError(f'{name} is not that of Fashion-MNIST: give the original file')


def _reduce(data, shape, side):
    """Return an IDX file with images of `side` pixels; one of labels as it is."""
    if len(shape) == 1 or side == SIDE:
        return data
    images = np.frombuffer(data, np.uint8)[len(idx_head(shape)) :].reshape(shape)
    small = [cv2.resize(x, (side, side), interpolation=cv2.INTER_AREA) for x in images]
    return idx_head((shape[0], side, side)) + np.stack(small).tobytes()


def make_fashion(out='data/fashion', folder=None, root='/', side=SIDE, shapes=SHAPES):
    """Unpack Fashion-MNIST, unless `out` holds it already.

    Args:
        out (str | pathlib.Path): Folder to write.
        folder (str | pathlib.Path | None): Where the four files are, as IDX or IDX in
            gzip; None for Debian's package.
        root (str | pathlib.Path): Where the package is unpacked.
        side (int): Height and width of the images to write, in pixels.
        shapes (dict[str, tuple[int, ...]]): Names of the files, with their shapes.

    Returns:
        pathlib.Path: The folder `out`.

    Raises:
        ValueError: `side` is no size to reduce to, `out` holds other files, or a file
            is not of Fashion-MNIST.
        OSError: A file is missing or damaged, or `out` cannot be written.
    """
    if not 4 <= side <= SIDE:
        raise ValueError(f'--side must be from 4 to {SIDE} pixels, got {side}')
    out = Path(out)
    fix = (
        f'apt-get install {PACKAGE}, or unpack that package with dpkg -x and give the '
        'folder as --root, or give a folder with the four files as --folder'
    )
    place = Path(root) / PLACE if folder is None else Path(folder)
    files = {name: _read(place, name, fix) for name in shapes}
    for name, data in files.items():
        _check(name, data, shapes[name])
    files = {name: _reduce(data, shapes[name], side) for name, data in files.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    settings = {'recipe': RECIPE, 'license': 'MIT', 'files': hashes}
    try:
        out.mkdir(parents=True, exist_ok=True)
        found, _ = read_manifest(out, RECIPE.rstrip(' 0123456789'))
        if found == settings and all((out / name).is_file() for name in files):
            print(f'{out} is up to date: nothing to do')
            return out
        begin_manifest(out, settings)
        for name, data in files.items():
            (out / name).write_bytes(data)
        finish_manifest(out)
    except OSError as error:
        raise OSError(
            f'--out {out} cannot be written ({error.strerror}): choose another folder'
        ) from error
    return out
