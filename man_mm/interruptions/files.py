"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import runner

BACKEND = 'man_mm_atomic'
_UNFINISHED = 'unfinished.tmp'


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    The data reaches the disk in ``unfinished.tmp`` beside it before that is renamed.

    Args:
        path: The file; its folder is made if need be.
        write: Writes its new content into the file that it is called with.

    Raises:
        OSError: If it cannot be written. An older file of this name is then as it was.
    """
    temporary = path.with_name(_UNFINISHED)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, 'wb') as file:
            write(file)
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
        """Writes a file."""
        write_atomically(Path(filepath), lambda file: file.write(obj))

    def remove(self, filepath: str | Path) -> None:
        """Marks a file, for `finish`."""
        self._condemned.append(filepath)

    def finish(self, remove: bool) -> None:
        """Removes the marked files, or spares them."""
        for path in self._condemned if remove else ():
            Path(path).unlink(missing_ok=True)
        self._condemned.clear()


register_backend(BACKEND, AtomicBackend)


def save(checkpoint: Any, file: BinaryIO) -> None:
    """``torch.save`` into an open file.

    Raises:
        OSError: If a write fails.
    """
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # Of a write that fails, torch itself tells that the file is too short.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextmanager
def checkpoints_streamed() -> Iterator[None]:
    """Lets a ``Runner`` write checkpoints by `AtomicBackend` as they are.

    mmengine puts together a file's content in memory first.
    """
    stock = runner.save_checkpoint

    def write(checkpoint: dict, filename: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get('backend_args') == dict(backend=BACKEND):
            write_atomically(Path(filename), lambda file: save(checkpoint, file))
        else:
            stock(checkpoint, filename, *args, **kwargs)

    runner.save_checkpoint = write
    try:
        yield
    finally:
        runner.save_checkpoint = stock
