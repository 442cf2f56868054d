"""Configs: where they are found, and how the tools read them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

from .quiet import quiet


def shipped_folder() -> Path:
    """The folder that holds ``configs`` and ``tools``.

    Returns:
        ``.mim`` inside of an installed package, the clone of one that is not installed.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / '.mim'
    return installed if installed.is_dir() else package.parent


def find_config(path: str | Path) -> Path:
    """Finds a config from any folder.

    Args:
        path: Path of a config, relative to the current folder, or else to that of
            `shipped_folder`, such as ``configs/man/retinanet_r50_man_coco.py``.

    Raises:
        FileNotFoundError: If it is in neither of them.
    """
    for found in (Path(path), shipped_folder() / path):
        if found.is_file():
            return found
    raise FileNotFoundError(
        f'There is no config {str(path)!r}, neither in {Path.cwd()} nor among those of '
        f'man_mm in {shipped_folder()}.'
    )


def load_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Loads a config, its custom imports and its default scope.

    As the runner does, it gives the model the ``data_preprocessor`` of the config.

    Args:
        path: Path of the config, as `find_config` takes it, or its name in a package
            (``'mmdet::...'``).
        options: Settings to override, each ``KEY=VALUE``.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    is_name = '::' in str(path)
    cfg = get_config(str(path)) if is_name else Config.fromfile(find_config(path))
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--options', *options]).options)
    if 'model' in cfg and 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    import_custom_modules(cfg)
    with quiet():
        init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg


def import_custom_modules(cfg: Config) -> None:
    """Imports the ``custom_imports`` of a config, also those that an option has set.

    mmengine imports only those of the file, when it reads it.

    Args:
        cfg: The config.
    """
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=None)))
