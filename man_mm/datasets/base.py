"""Small labelled images that come as a few large files."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset


class ImageArrays(BaseDataset):
    """Labelled images of one split, held in memory.

    An item has ``img``, RGB ``(H, W, 3)`` in uint8, and ``gt_label``, from 0.

    Attributes:
        FILES: Names of the files of each split.
        SOURCE: Where they can be downloaded.

    Args:
        data_root: Folder with the files.
        split: ``'train'`` or ``'test'``. Defaults to ``'train'``.
        **kwargs: Arguments of mmengine's ``BaseDataset``, such as ``pipeline`` and
            ``indices``.

    Raises:
        ValueError: If ``split`` is unknown.
        FileNotFoundError: If a file is missing; says what to download.
    """

    FILES: dict[str, tuple[str, ...]]
    SOURCE: str

    def __init__(self, data_root: str, split: str = 'train', **kwargs: Any) -> None:
        if split not in self.FILES:
            raise ValueError(
                f'dataset.split of {type(self).__name__} must be one of '
                f'{list(self.FILES)}, got {split!r}.'
            )
        self.split = split
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the files of the split."""
        paths = [Path(self.data_root) / name for name in self.FILES[self.split]]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f'{type(self).__name__} needs {", ".join(missing)} in '
                f'dataset.data_root={self.data_root!r}: download them from '
                f'{self.SOURCE} and put them there.'
            )
        images, labels = self.read(paths)
        return [
            dict(img=image, gt_label=np.array(label, dtype=np.int64))
            for image, label in zip(images, labels, strict=True)
        ]

    @abstractmethod
    def read(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Reads files.

        Args:
            paths: Those of `FILES`, which exist.

        Returns:
            Images ``(N, H, W, 3)`` in uint8, and labels ``(N,)`` from 0.
        """
