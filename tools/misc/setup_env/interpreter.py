"""The Python of ``.venv``: which one it is made from, and its packages' traces."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from places import LOCK, LOG, PYTHON, VENV
from shell import SetupError, Shell

SUPPORTED_MINORS = (11, 12, 10)  # of Python 3, the best tested first


def probe(python: str | Path) -> tuple[int, bool] | None:
    """Ask an interpreter for its minor version and whether it can make a venv.

    Returns:
        ``(minor, has_venv)``, or None if it is not a Python 3 that runs.
    """
    code = (
        'import sys, importlib.util as u; assert sys.version_info[0] == 3;'
        'print(sys.version_info[1], int(u.find_spec("ensurepip") is not None))'
    )
    try:
        output = subprocess.check_output(
            [str(python), '-c', code], text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    minor, has_venv = map(int, output.split())
    return minor, bool(has_venv)


def choose_python(candidates: Iterable[str]) -> str:
    """Return the first candidate that is supported.

    Raises:
        SetupError: If none is; the message names what was found.
    """
    rejected = []
    for python in candidates:
        found = probe(python)
        if found is None:
            continue
        minor, has_venv = found
        if minor in SUPPORTED_MINORS and has_venv:
            return python
        why = '' if has_venv else f' without venv (install python3.{minor}-venv)'
        rejected.append(f'Python 3.{minor}{why}')
    raise SetupError(
        'man_mm needs Python 3.10, 3.11 or 3.12, but found only '
        f'{", ".join(dict.fromkeys(rejected)) or "none"}. '
        'Install one, or name it: make setup PYTHON=/path/to/python3.11'
    )


def venv_works() -> bool:
    """Tell whether ``.venv`` has a supported Python and a pip that runs."""
    found = probe(PYTHON)
    if found is None or found[0] not in SUPPORTED_MINORS:
        return False
    check = [str(PYTHON), '-m', 'pip', '--version']
    return subprocess.run(check, capture_output=True).returncode == 0


def create_venv(shell: Shell) -> None:
    """Create ``.venv``, unless a working one is there."""
    if venv_works():
        return
    for path in VENV.iterdir():
        if path not in (LOG, LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Seen from inside a virtual environment, the one it was made from.
    current = getattr(sys, '_base_executable', sys.executable)
    others = [f'python3.{minor}' for minor in SUPPORTED_MINORS]
    shell.run(choose_python([current, *others]), '-m', 'venv', VENV)


def remove_incomplete_packages() -> None:
    """Remove the traces of an interrupted pip, which pip takes for installed.

    pip renames what it replaces to ``~name`` and, as the last thing, lists its own
    ``INSTALLER`` file in ``RECORD``.
    """
    for site in VENV.glob('lib/python3*/site-packages'):
        for path in site.glob('~*'):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for info in site.glob('*.dist-info'):
            record = info / 'RECORD'
            if not record.exists() or '/INSTALLER,' not in record.read_text('utf-8'):
                shutil.rmtree(info)
