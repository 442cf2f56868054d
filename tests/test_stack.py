"""No installation of man_mm touches another package, and mixed stacks are named."""

import json
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
from packages import ON_FORKS
from packaging.requirements import Requirement
from test_package import BLOCK_IMPORTS, REQUIREMENTS, read_requirements, run_python

from man_mm import stack

OFFICIAL = dict(
    mmengine={'mmengine': '0.10.7'},
    mmcv={'mmcv': '2.1.0'},
    mmdet={'mmdet': '3.3.0'},
    mmpretrain={'mmpretrain': '1.2.0'},
    mmagic={'mmagic': '1.2.0'},
)
FORKS = dict(
    mmengine={'onedl-mmengine': '0.10.12'},
    mmcv={'onedl-mmcv': '2.3.6'},
    mmdet={'onedl-mmdetection': '3.5.1'},
    mmpretrain={'onedl-mmpretrain': '1.3.6'},
    mmagic={},
)


def pip_would_install(wheel, extra=''):
    """The names of what pip would install here, without any index; None if it fails."""
    options = ['--dry-run', '--quiet', '--no-index', '--report', '-']
    command = [sys.executable, '-m', 'pip', 'install', *options, f'{wheel}{extra}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert 'No matching distribution found' in done.stderr
        return None
    return {x['metadata']['name'] for x in json.loads(done.stdout)['install']}


@pytest.mark.parametrize('extra', ['', '[det]', '[cls]'])
def test_pip_installs_nothing_else(wheel, extra):
    if ON_FORKS:
        extra = extra.replace('[', '[onedl-')
    assert pip_would_install(wheel, extra) <= {'man-mm'}


def test_the_extra_of_the_other_stack_would_pull_its_packages(wheel):
    assert pip_would_install(wheel, '[det]' if ON_FORKS else '[onedl-det]') is None


def test_no_list_names_both_stacks():
    official = {name for brought in OFFICIAL.values() for name in brought}
    forks = {name for brought in FORKS.values() for name in brought}
    for path in REQUIREMENTS.glob('*.txt'):
        if path.name != 'constraints.txt':
            names = {x.name for x in read_requirements(path.stem)}
            assert not (names & official and names & forks)
            assert path.stem != 'runtime' or not names & (official | forks)


def test_the_oldest_versions_are_those_of_the_lists():
    bounds = {}
    for name in ('det', 'cls', 'no-deps'):
        bounds |= {x.name: x for x in read_requirements(name)}
    for name, oldest in stack.OLDEST.items():
        assert f'>={oldest}' in str(bounds[name].specifier).split(',')
    for name in ('mmdet', 'mmagic'):
        assert version_is_allowed(bounds['mmcv'], '2.1.0')
        assert not version_is_allowed(bounds['mmcv'], stack.REFUSED_MMCV), name


def version_is_allowed(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version)


def test_installed_packages_are_found_by_import_name():
    found = {name: stack.find_distributions(name) for name in stack.OLDEST}
    expected = FORKS if ON_FORKS else OFFICIAL
    assert {name: set(x) for name, x in found.items()} == {
        name: set(x) for name, x in expected.items()
    }
    for distributions in found.values():
        for name, installed in distributions.items():
            assert installed == version(name)
    assert stack.find_distributions('no_such_package') == {}


def test_both_stacks_go_together():
    assert stack.find_problems(OFFICIAL) == stack.find_problems(FORKS) == []


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(mmcv={'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'}),
            'mmcv was installed by mmcv and onedl-mmcv, one over the other',
        ),
        (
            dict(mmengine={'mmengine': '0.9.1'}),
            'mmengine 0.9.1 is too old: man_mm needs 0.10.3 or later',
        ),
        (
            dict(mmcv={'mmcv': '2.2.0'}, mmagic={}),
            'mmdet 3.3.0 needs mmcv below 2.2.0, and refuses 2.2.0',
        ),
        (
            dict(mmcv={'onedl-mmcv': '2.3.6'}, mmdet={}),
            'mmagic 1.2.0 needs mmcv below 2.2.0, and refuses 2.3.6',
        ),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    (problem,) = stack.find_problems(OFFICIAL | change)
    assert problem.startswith(message)


def test_one_warning_names_all_problems(tmp_path, monkeypatch):
    for name in ('mmcv', 'mmdet'):
        package = tmp_path / name
        package.mkdir()
        (package / '__init__.py').touch()
        for distribution in (name, f'onedl-{name}'):
            info = tmp_path / f'{distribution.replace("-", "_")}-2.0.dist-info'
            info.mkdir()
            (info / 'METADATA').write_text(f'Name: {distribution}\nVersion: 2.0\n')
            (info / 'RECORD').write_text(f'{name}/__init__.py,,\n')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('mmcv', 'mmdet'):  # which other tests may have imported
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(UserWarning) as caught:
        stack.check_stack()
    (message,) = [str(x.message) for x in caught]
    for name in ('mmcv', 'mmdet'):
        assert f'- {name} was installed by {name} and onedl-{name}' in message
    assert stack.INSTALL in message
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        stack.check_stack()


def test_without_mmengine_there_is_the_method_in_plain_pytorch():
    code = BLOCK_IMPORTS.format(blocked=('mmengine',)) + (
        'import man_mm\n'
        'from man_mm.core import LocalLearner\n'
        'assert man_mm.LocalLearner is LocalLearner\n'
        'assert not hasattr(man_mm, "no_such_name")\n'
        'try:\n    from man_mm import MANHead\n'
        'except ImportError as error:\n    print(error)\n'
    )
    (message,) = run_python('-c', code).splitlines()[-1:]
    assert message == f'man_mm.MANHead needs mmengine. {stack.INSTALL}'
