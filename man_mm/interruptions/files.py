"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import MMLogger

ATOMIC_BACKEND = 'man_mm_atomic'
TEMPORARY = '.tmp'
_CHUNK = 2**20


def write_atomically(path: str | Path, data: bytes, is_checkpoint: bool) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    The data goes to a temporary file in the same folder, to the disk, and is read
    back before the file is renamed.

    Args:
        path: The file.
        data: Its new content.
        is_checkpoint: Whether ``torch.load`` must be able to read it.

    Raises:
        OSError: If it cannot be written, or is not what was written when read back.
            An older file of this name is then as it was.
    """
    temporary = Path(f'{path}{TEMPORARY}')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _check_written(temporary, data)
        if is_checkpoint:
            _warn_unless_loadable(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # gives its space back
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(temporary.parent)


def _check_written(path: Path, data: bytes) -> None:
    with open(path, 'rb') as file:
        for start in range(0, len(data), _CHUNK):
            if file.read(_CHUNK) != data[start : start + _CHUNK]:
                raise OSError(errno.EIO, 'The disk returns other data', str(path))


def _warn_unless_loadable(path: Path) -> None:
    # The bytes are right, so what is not loaded was put in by the configuration.
    try:
        torch.load(path, map_location='cpu', mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        MMLogger.get_current_instance().warning(
            f'The checkpoint {path.name.removesuffix(TEMPORARY)} cannot be resumed, '
            f'because a hook put more than data into it: {reason}'
        )


def _sync_folder(folder: Path) -> None:
    # The new name must survive a power cut; not every file system can promise it.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicBackend(LocalBackend):
    """Local files; checkpoints are written atomically and read back."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, obj, is_checkpoint=True)


class PatientBackend(AtomicBackend):
    """Removes files only when told that what replaces them is in place."""

    def __init__(self) -> None:
        self._condemned: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self._condemned.append(str(filepath))

    def remove_now(self, keep: set[str]) -> None:
        """Removes what was to be removed, but for files that were written anew."""
        for path in self._condemned:
            if path not in keep:
                Path(path).unlink(missing_ok=True)
        self._condemned.clear()

    def spare(self) -> None:
        """Forgets what was to be removed."""
        self._condemned.clear()


register_backend(ATOMIC_BACKEND, AtomicBackend, force=True)
