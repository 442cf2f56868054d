"""Examples in docstrings run, and what users call has one."""

import doctest
import importlib
import pkgutil
import sys
from types import ModuleType

import pytest
import torch
from conftest import needs_mmagic
from mmengine.logging import MMLogger

import man_mm
import man_mm.measure
import man_mm.parallel

PACKAGES = (man_mm, man_mm.measure, man_mm.parallel)
# Imports mmagic, which is not asked of everybody.
NEEDS_MMAGIC = 'man_mm.backbones.mmagic_models'
RESULTS = ('MemoryReport',)  # returned, never built by users
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def find_examples(module):
    tests = doctest.DocTestFinder(exclude_empty=True).find(module)
    return [test for test in tests if test.examples]


def modules():
    for info in pkgutil.walk_packages(man_mm.__path__, 'man_mm.'):
        if info.name != NEEDS_MMAGIC:
            yield importlib.import_module(info.name)


EXAMPLES = [test for module in modules() for test in find_examples(module)]


def run(test):
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    runner.run(test, out=report.append, clear_globs=False)
    return ''.join(report)


@pytest.fixture
def surroundings():
    """What examples may change: backbone adapters, random numbers."""
    from man_mm.backbones.base import ADAPTERS

    adapters = dict(ADAPTERS)
    MMLogger.get_current_instance()  # logs to the real output, not to an example's
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    ADAPTERS.clear()
    ADAPTERS.update(adapters)


@pytest.mark.parametrize('test', EXAMPLES, ids=lambda test: test.name)
def test_examples_run(test, surroundings):
    if 'mmagic::' in test.docstring:
        needs_mmagic()
    assert run(test) == ''


def test_a_wrong_example_is_noticed(surroundings):
    module = ModuleType('wrong', 'Adds.\n\n>>> 1 + 1\n3\n')
    (test,) = find_examples(module)
    assert 'Expected:\n    3\nGot:\n    2' in run(test)


def public_names():
    for package in PACKAGES:
        for name in package.__all__:
            if not name.startswith('__') and name not in RESULTS:
                yield getattr(package, name)


@pytest.mark.parametrize(
    'public', list(public_names()), ids=lambda public: public.__name__
)
def test_what_users_call_has_an_example(public):
    module = sys.modules[public.__module__]
    assert f'{module.__name__}.{public.__name__}' in {t.name for t in EXAMPLES}
