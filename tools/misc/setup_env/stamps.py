"""Stamps of finished steps, by which a step knows that it need not run again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from places import ROOT, STAMPS
from steps import Step


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash the names and contents of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob('*')) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and '__pycache__' not in file.parts:
                digest.update(f'{file.relative_to(ROOT)}\0'.encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def stamp_keys(steps: Iterable[Step], start: str) -> dict[str, str]:
    """Compute what each step's stamp holds when the step is up to date.

    A key includes the one before it: a step that changed runs the later ones, too.
    """
    keys = {}
    for step in steps:
        start = hashlib.sha256(f'{start} {fingerprint(step.inputs)}'.encode())
        start = keys[step.name] = start.hexdigest()
    return keys


def is_stamped(name: str, key: str) -> bool:
    """Tell whether a step was finished with this key."""
    stamp = STAMPS / name
    return stamp.exists() and stamp.read_text('utf-8') == key


def write_stamp(name: str, key: str) -> None:
    """Record that a step is finished."""
    STAMPS.mkdir(exist_ok=True)
    (STAMPS / name).write_text(key, 'utf-8')
