"""The steps that follow the creation of ``.venv``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmcv_build import install_mmcv
from places import CONSTRAINTS, REQUIREMENTS, ROOT, SOURCES, STACK
from shell import Shell


class Step(NamedTuple):
    """One step of the set-up.

    Attributes:
        name: Name of its stamp.
        title: What the user reads.
        typical: How long it takes, for the user.
        inputs: Files and folders; the step runs again when one changes.
        action: Does the step.
    """

    name: str
    title: str
    typical: str
    inputs: tuple[Path, ...]
    action: Callable[[Shell], None]


def requirement_files(*names: str) -> list[str | Path]:
    """Return pip's arguments for requirement files."""
    files: list[str | Path] = []
    for name in names:
        files += ['-r', REQUIREMENTS / f'{name}.txt']
    return files


def install_torch(shell: Shell) -> None:
    """Install torch and torchvision in one call, so that their builds match."""
    shell.pip('install', 'torch', 'torchvision')


def install_build_tools(shell: Shell) -> None:
    """Install what builds mmcv without build isolation."""
    shell.pip('install', 'setuptools<82', 'wheel', 'packaging', 'ninja', 'psutil')


def install_requirements(shell: Shell) -> None:
    """Install the OpenMMLab packages and the tools for development."""
    shell.pip('install', *requirement_files(*STACK.lists))
    shell.pip('install', '--no-deps', *requirement_files(STACK.no_deps))


def install_package(shell: Shell) -> None:
    """Install man_mm; not editable, because mim finds no editable package."""
    shell.pip('install', '--no-deps', '--no-build-isolation', '--force-reinstall', ROOT)
    # Seen from the checkout, this metadata would hide the installed package's.
    shutil.rmtree(ROOT / 'man_mm.egg-info')
    shutil.rmtree(ROOT / 'build')


def all_steps() -> list[Step]:
    """Return the steps that follow the creation of ``.venv``, in their order."""
    lists = tuple(sorted(REQUIREMENTS.glob('*.txt')))
    package = tuple(ROOT / name for name in SOURCES)
    pinned = (CONSTRAINTS,)
    download = '2 to 10 min, a large download'
    build = '8 min on 2 cores, once; 20 s when it was built before'
    return [
        Step('torch', 'torch and torchvision', download, pinned, install_torch),
        Step('build-tools', 'build tools', '10 s', pinned, install_build_tools),
        Step('mmcv', 'mmcv with compiled ops', build, pinned, install_mmcv),
        Step('packages', 'other packages', '1 to 3 min', lists, install_requirements),
        Step('man_mm', 'man_mm itself', '10 s', package, install_package),
    ]
