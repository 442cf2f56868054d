"""Checks the built package, its requirement lists and what importing it loads."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import needs_mmagic
from packages import build_wheel, run_python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from man_mm.version import __version__

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
LISTS = ('runtime', 'det', 'cls', 'sr', 'no-deps', 'dev', 'docs')
LISTS += ('onedl-det', 'onedl-cls', 'onedl-no-deps')
OPTIONAL = ('mmcv', 'mmdet', 'mmpretrain', 'mmagic')

BLOCK_IMPORTS = """
import sys
from importlib.machinery import PathFinder
class Blocker(PathFinder):  # as if what it blocks were not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition('.')[0] not in {blocked!r}:
            return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Blocker
"""
PRINT_MODULES = """
import json
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))
"""


def import_in_fresh_python(module, blocked=()):
    """Import a module while others are blocked; return what got loaded."""
    code = BLOCK_IMPORTS.format(blocked=blocked) + f'import {module}\n' + PRINT_MODULES
    return set(json.loads(run_python('-c', code).splitlines()[-1]))


def names_in(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def files_in(folder):
    """Files by their paths, without what a build writes."""
    paths = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    built = ('build', 'man_mm.egg-info')
    return {path.as_posix() for path in paths if path.parts[0] not in built}


def read_requirements(name):
    lines = (REQUIREMENTS / f'{name}.txt').read_text('utf-8').splitlines()
    return [Requirement(x) for x in lines if x.strip() and not x.startswith('#')]


def read_constraints():
    """Return the pinned version of each constrained package."""
    pins = {}
    for requirement in read_requirements('constraints'):
        (specifier,) = requirement.specifier
        assert specifier.operator == '=='
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def unsatisfied(requirements, pins):
    """Return the requirements that the pinned versions miss."""
    return [
        str(requirement)
        for requirement in requirements
        if (pin := pins.get(canonicalize_name(requirement.name))) is not None
        and not requirement.specifier.contains(pin)
    ]


def test_wheel_has_what_mim_reads(wheel):
    names = names_in(wheel)
    assert 'man_mm/.mim/model-index.yml' in names
    for folder in ('configs', 'tools'):
        in_tree = {
            f'man_mm/.mim/{path.relative_to(ROOT).as_posix()}'
            for path in (ROOT / folder).rglob('*')
            if path.is_file()
            and path.suffix != '.pyc'
            and 'setup_env' not in path.parts
        }
        assert in_tree, f'{folder} is empty'
        assert in_tree <= names
    assert 'man_mm/.mim/tools/train.py' in names


def test_wheel_has_the_package_and_nothing_else(wheel):
    names = names_in(wheel)
    tops = {name.partition('/')[0] for name in names}
    assert tops == {'man_mm', wheel.name.split('-py3')[0] + '.dist-info'}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'man_mm').rglob('*.py')}
    assert modules == {x for x in names if x.endswith('.py') and '/.mim/' not in x}
    assert not [name for name in names if name.endswith('.pyc') or 'setup_env' in name]


def test_build_leaves_no_mim_folder_in_the_source(wheel, source_copy):
    assert not (source_copy / 'man_mm/.mim').exists()


def test_sdist_builds_the_same_wheel(wheel, source_copy, tmp_path):
    code = 'import sys; from setuptools.build_meta import build_sdist as build;'
    run_python('-c', f'{code} build(sys.argv[1])', tmp_path, cwd=source_copy)
    (sdist,) = tmp_path.glob('*.tar.gz')
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    in_tree, in_sdist = files_in(source_copy), files_in(unpacked)
    assert {'CITATION.cff', 'mkdocs.yml', 'docs/site/hooks.py'} <= in_tree <= in_sdist
    assert names_in(build_wheel(unpacked, tmp_path)) == names_in(wheel)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text('utf-8'))
    assert citation['version'] == __version__
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    (paper,) = citation['references']
    assert paper['url'] == 'https://arxiv.org/abs/2406.00446'


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = (x for x in archive.namelist() if x.endswith('.dist-info/METADATA'))
    metadata = archive.read(path).decode()
    assert re.search(r'^Name: man[-_]mm$', metadata, re.M)
    extras = set(re.findall(r'^Provides-Extra: (.+)$', metadata, re.M))
    forks = {'onedl-det', 'onedl-cls'}
    assert extras == {'det', 'cls', 'sr', 'all', 'dev', 'docs', *forks}
    required = re.findall(r'^Requires-Dist: (.+)$', metadata, re.M)
    always = {Requirement(x).name for x in required if 'extra ==' not in x}
    assert always == {'torch', 'numpy', 'rich', 'scipy'}


@pytest.mark.parametrize('name', LISTS)
def test_constraints_satisfy_requirements(name):
    assert unsatisfied(read_requirements(name), read_constraints()) == []


@pytest.mark.parametrize('name', LISTS)
def test_constraints_cover_requirements(name):
    named = {canonicalize_name(r.name) for r in read_requirements(name)}
    floating = {'colorama', 'requests', 'tabulate'}
    assert named - set(read_constraints()) <= floating


def test_unsatisfied_finds_an_old_pin():
    pins = read_constraints() | {'torch': '1.13.1'}
    assert unsatisfied(read_requirements('runtime'), pins) == ['torch>=2.9.1']


def test_import_loads_no_heavy_packages():
    loaded = import_in_fresh_python('man_mm')
    assert {'man_mm', 'mmengine', 'torch'} <= loaded
    assert not loaded & {'diffusers', *OPTIONAL}
    # mmengine looks for an optimizer in transformers, if that is installed.
    assert 'transformers' not in loaded - import_in_fresh_python('mmengine.runner')


def test_import_needs_no_other_openmmlab_package():
    assert 'man_mm' in import_in_fresh_python('man_mm', blocked=OPTIONAL)


def test_blocker_blocks():
    with pytest.raises(AssertionError, match="No module named 'mmengine'"):
        import_in_fresh_python('man_mm.engine', blocked=('mmengine',))


@pytest.mark.parametrize('package', ['diffusers', 'mmagic'])
def test_an_mmagic_that_cannot_be_imported_is_explained(package):
    if package != 'mmagic':
        needs_mmagic()
    code = BLOCK_IMPORTS.format(blocked=(package,))
    code += 'try:\n    import man_mm.backbones.mmagic_models\n'
    code += 'except RuntimeError as error:\n    print(error)\n'
    (message,) = run_python('-W', 'ignore', '-c', code).splitlines()[-1:]
    assert f"because of the package '{package}'" in message
    for command in ("pip install '.[sr]'", "pip install --no-deps 'mmagic>=1.2.0'"):
        assert command in message
