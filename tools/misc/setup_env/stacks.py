"""The sets of OpenMMLab packages that an environment can be made of."""

from __future__ import annotations

from typing import NamedTuple


class Stack(NamedTuple):
    """Packages that share import names with those of the other stacks.

    Attributes:
        venv: Folder of the environment in the checkout.
        mmcv: Distribution that brings ``mmcv``, which is built here.
        lists: Requirement files that are installed with their dependencies.
        no_deps: Requirement file that is installed without.
    """

    venv: str
    mmcv: str
    lists: tuple[str, ...]
    no_deps: str


_TOOLS = ('dev', 'docs')
STACKS = {
    'openmmlab': Stack(
        '.venv', 'mmcv', ('runtime', 'det', 'cls', 'sr', *_TOOLS), 'no-deps'
    ),
    'onedl': Stack(
        '.venv-onedl',
        'onedl-mmcv',
        ('runtime', 'onedl-det', 'onedl-cls', *_TOOLS),
        'onedl-no-deps',
    ),
}


def choose_stack(name: str) -> Stack:
    """Return the stack of this name.

    Raises:
        SystemExit: If there is none; the message names those that there are.
    """
    if name not in STACKS:
        raise SystemExit(
            f'There is no stack {name!r}: make setup STACK={" or ".join(STACKS)}'
        )
    return STACKS[name]
