"""Street View House Numbers, cropped digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmengine import registry as root

from .base import ImageArrays


@root.DATASETS.register_module()
class SVHN(ImageArrays):
    """Street View House Numbers (Netzer et al. 2011), format 2: digits, 32×32 pixels.

    73,257 images for training and 26,032 for testing; the 531,131 easier ones
    (``extra``) are not used. See `ImageArrays`.

    Examples:
        >>> from man_mm import SVHN
        >>> dataset = SVHN('data/svhn', split='test', lazy_init=True)
        >>> len(dataset.metainfo['classes'])
        10
    """

    METAINFO = dict(classes=tuple('0123456789'))
    FILES = dict(train=('train_32x32.mat',), test=('test_32x32.mat',))
    SOURCE = 'http://ufldl.stanford.edu/housenumbers/'

    def read(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Reads MATLAB files; see `ImageArrays.read`."""
        from scipy.io import loadmat  # slow to import

        content = loadmat(paths[0])
        images = np.ascontiguousarray(content['X'].transpose(3, 0, 1, 2))
        return images, content['y'].flatten() % 10  # a zero has the label 10
