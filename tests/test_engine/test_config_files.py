"""Configs are found from any folder."""

from pathlib import Path

import pytest

from man_mm.engine import config_files
from man_mm.engine.config_files import find_config, load_config, shipped_folder

DEMO = 'configs/man/retinanet_r18_man_demo.py'


def test_a_config_of_this_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_config(DEMO)
    assert found == shipped_folder() / DEMO and found.is_file()
    assert load_config(DEMO, ['train_cfg.max_iters=3']).train_cfg.max_iters == 3
    # One in the current folder comes first.
    own = tmp_path / DEMO
    own.parent.mkdir(parents=True)
    own.write_text('x = 1')
    assert find_config(DEMO) == Path(DEMO)


def test_a_config_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find_config('configs/none.py')
    for words in ("'configs/none.py'", str(tmp_path), str(shipped_folder())):
        assert words in str(error.value)


def test_an_installed_package_ships_its_own(tmp_path, monkeypatch):
    package = tmp_path / 'man_mm/engine'
    (tmp_path / 'man_mm/.mim').mkdir(parents=True)
    monkeypatch.setattr(config_files, '__file__', str(package / 'config_files.py'))
    assert shipped_folder() == tmp_path / 'man_mm/.mim'
