"""Checks the parts of ``tools/misc/setup_env`` that need no network."""

import importlib
import runpy
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / 'tools/misc/setup_env'


NAMES = [path.stem for path in FOLDER.glob('*.py') if path.stem != '__main__']


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """Load the files as if they lay in an empty checkout."""
    copy = tmp_path / 'tools/misc/setup_env'
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.syspath_prepend(copy)
    names = {}
    for name in NAMES:
        names |= vars(importlib.import_module(name))
    names |= runpy.run_path(str(copy / '__main__.py'))
    names['VENV'].mkdir()
    yield SimpleNamespace(**names)
    for name in NAMES:
        del sys.modules[name]


def fake_python(folder, minor, has_venv=True):
    """Write a program that answers like a Python of this version."""
    path = folder / f'python3.{minor}'
    path.write_text(f'#!/bin/sh\necho {minor} {int(has_venv)}\n')
    path.chmod(0o755)
    return str(path)


def make_step(setup_env, name, *inputs):
    return setup_env.Step(name, name, '1 s', inputs, lambda shell: None)


def test_the_first_supported_python_is_chosen(setup_env, tmp_path):
    new, old = fake_python(tmp_path, 13), fake_python(tmp_path, 10)
    assert setup_env.choose_python(['/nonexistent/python', new, old]) == old


def test_an_unsupported_python_is_named(setup_env, tmp_path):
    candidates = [fake_python(tmp_path, 13), fake_python(tmp_path, 11, has_venv=False)]
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.choose_python(candidates)
    assert 'needs Python 3.10, 3.11 or 3.12' in str(error.value)
    assert 'Python 3.13' in str(error.value)
    assert 'install python3.11-venv' in str(error.value)


def test_this_python_can_be_probed(setup_env):
    minor, _ = setup_env.probe(sys.executable)
    assert minor == sys.version_info.minor


def test_a_change_reruns_its_step_and_the_later_ones(setup_env):
    first, second = setup_env.ROOT / 'first.txt', setup_env.ROOT / 'second'
    first.write_text('1')
    second.mkdir()
    (second / 'file.py').write_text('2')
    steps = [make_step(setup_env, 'a', first), make_step(setup_env, 'b', second)]
    before = setup_env.stamp_keys(steps, 'Python 3.11')

    (second / '__pycache__').mkdir()
    (second / '__pycache__/file.pyc').write_text('x')
    assert setup_env.stamp_keys(steps, 'Python 3.11') == before

    (second / 'file.py').rename(second / 'renamed.py')
    after = setup_env.stamp_keys(steps, 'Python 3.11')
    assert after['a'] == before['a']
    assert after['b'] != before['b']

    first.write_text('changed')
    last = setup_env.stamp_keys(steps, 'Python 3.11')
    assert last['a'] != after['a']
    assert last['b'] != after['b']


def test_stamps(setup_env):
    assert not setup_env.is_stamped('a', 'key')
    setup_env.write_stamp('a', 'key')
    assert setup_env.is_stamped('a', 'key')
    assert not setup_env.is_stamped('a', 'other key')


def test_traces_of_an_interrupted_pip_are_removed(setup_env):
    site = setup_env.VENV / 'lib/python3.11/site-packages'
    for name in ('whole', 'cut', 'unlisted'):
        (site / f'{name}-1.0.dist-info').mkdir(parents=True)
    record = 'whole/__init__.py,,\nwhole-1.0.dist-info/INSTALLER,sha256=x,4\n'
    (site / 'whole-1.0.dist-info/RECORD').write_text(record)
    (site / 'unlisted-1.0.dist-info/RECORD').write_text('unlisted.py,,\n')
    (site / '~hole').mkdir()
    setup_env.remove_incomplete_packages()
    assert [path.name for path in site.iterdir()] == ['whole-1.0.dist-info']


def test_a_failing_command_is_reported(setup_env, tmp_path):
    with (tmp_path / 'log').open('w+') as log, (tmp_path / 'lock').open('w') as lock:
        shell = setup_env.Shell(log, lock)
        shell.run(sys.executable, '-c', 'print("fine")')
        with pytest.raises(setup_env.SetupError, match='exited with 3'):
            shell.run(sys.executable, '-c', 'print("bad"); raise SystemExit(3)')
    assert {'fine', 'bad'} <= set((tmp_path / 'log').read_text().splitlines())


def test_progress_lines(setup_env):
    assert setup_env.shorten(' [37/77] c++ -MMD x.cpp\n') == 'compiling [37/77]'
    assert setup_env.shorten('Collecting  torch\n') == 'Collecting torch'
    assert setup_env.duration(4.21) == '4.2 s'
    assert setup_env.duration(185) == '3 min 05 s'


def test_a_second_set_up_waits_for_the_first(setup_env, capsys):
    with setup_env.LOCK.open('w') as first, setup_env.LOCK.open('w') as second:
        setup_env.lock_venv(first)
        assert capsys.readouterr().out == ''
        waiting = threading.Thread(target=setup_env.lock_venv, args=(second,))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        first.close()
        waiting.join(10)
        assert not waiting.is_alive()
    assert 'Waiting for another set-up' in capsys.readouterr().out
