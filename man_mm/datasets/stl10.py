"""STL-10, of which the labelled images are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine import registry as root

from .base import ImageArrays

_SHAPE = (3, 96, 96)


@root.DATASETS.register_module()
class STL10(ImageArrays):
    """STL-10 (Coates et al. 2011): 96×96 pixels, 10 classes.

    5,000 images for training and 8,000 for testing; the 100,000 without label are not
    used. See `ImageArrays`.

    Examples:
        >>> from man_mm import STL10
        >>> dataset = STL10('data/stl10_binary', split='test', lazy_init=True)
        >>> dataset.metainfo['classes'][:3]
        ('airplane', 'bird', 'car')
    """

    METAINFO = dict(
        classes=(
            'airplane',
            'bird',
            'car',
            'cat',
            'deer',
            'dog',
            'horse',
            'monkey',
            'ship',
            'truck',
        )
    )
    FILES = dict(
        train=('train_X.bin', 'train_y.bin'), test=('test_X.bin', 'test_y.bin')
    )
    SOURCE = 'https://cs.stanford.edu/~acoates/stl10/ (stl10_binary.tar.gz)'

    def read(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Reads binary files; see `ImageArrays.read`."""
        images, labels = (np.fromfile(path, dtype=np.uint8) for path in paths)
        # Pixels are in column-major order.
        images = images.reshape(-1, *_SHAPE).transpose(0, 3, 2, 1)
        return np.ascontiguousarray(images), labels - 1
