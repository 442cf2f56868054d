"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

BACKEND = 'man_mm_atomic'
_UNFINISHED = 'unfinished.tmp'


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    The data reaches the disk in ``unfinished.tmp`` beside it before that is renamed.

    Args:
        path: The file.
        data: Its new content.

    Raises:
        OSError: If it cannot be written. An older file of this name is then as it was.
    """
    temporary = path.with_name(_UNFINISHED)
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # gives its space back
            temporary.unlink()
        raise
    with suppress(OSError):  # not every file system can promise to keep the new name
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class AtomicBackend(LocalBackend):
    """Local files, written atomically, and not removed before `finish`.

    mmengine removes a checkpoint before it saves the one that takes its place.
    """

    def __init__(self) -> None:
        self._condemned: list[str | Path] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes a file, and its folder if need be."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, obj)

    def remove(self, filepath: str | Path) -> None:
        """Marks a file, for `finish`."""
        self._condemned.append(filepath)

    def finish(self, remove: bool) -> None:
        """Removes the marked files, or spares them."""
        for path in self._condemned if remove else ():
            Path(path).unlink(missing_ok=True)
        self._condemned.clear()


register_backend(BACKEND, AtomicBackend)
