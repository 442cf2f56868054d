"""Data sets of a few images."""

import numpy as np

from man_mm.datasets.make_fashion import SHAPES, idx_head, make_fashion


def tiny_fashion(folder):
    """A few images in the files of Fashion-MNIST."""
    shapes = {name: (8, *shape[1:]) for name, shape in SHAPES.items()}
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        data = rng.integers(10, size=shape, dtype=np.uint8).tobytes()
        (folder / name).write_bytes(idx_head(shape) + data)
    return make_fashion(folder.parent / 'fashion', folder, shapes=shapes)
