"""Commands in the documents name files, arguments and targets that exist."""

import argparse
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from documents import DOCUMENTS, blocks
from mmengine import registry as root
from mmengine.config import Config

from man_mm import LocalLearningOptimWrapperConstructor


class Parsed(Exception):
    pass


def parser_of(script, monkeypatch):
    """The argument parser that a script builds when it is called."""
    found = []

    def capture(parser, *_, **__):
        found.append(parser)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', capture)
        patch.setattr(sys, 'argv', [str(script)])
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name='__main__')
    (parser,) = found
    return parser


@pytest.fixture
def parse(monkeypatch):
    """Parses the arguments of a tool, as the tool does; each tool is read once."""
    known = {}

    def error(parser, message):
        raise ValueError(f'{parser.prog}: {message}')

    monkeypatch.setattr(argparse.ArgumentParser, 'error', error)

    def run(script, args):
        if script not in known:
            known[script] = parser_of(script, monkeypatch)
        known[script].parse_args(args)

    return run


def commands(text):
    """The commands of all bash blocks, each a list of words."""
    for block in blocks(text, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            for part in line.split(' && '):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r'[A-Z_]+=\S+', words[0]):
                    words = words[1:]
                if words:
                    yield words


def is_placeholder(word):
    return bool(re.search('[A-Z]{4}', word)) or '...' in word


def check_command(words, parse):
    """Fails if a command names a file, an argument or a target that is not there."""
    program, *rest = words
    known = {
        'python': check_python,
        'torchrun': check_python,
        'mim': check_mim,
        'make': check_make,
        'pip': check_pip,
        'pytest': check_pytest,
    }
    if program not in known:
        assert program in ('apt-get', 'cd', 'git', 'source'), (
            f'nothing checks {program}'
        )
        return
    known[program](rest, parse)


def check_python(words, parse):
    if words[0] == '-m':
        (module,) = words[1:]  # of the examples, which take no arguments
        assert Path('examples', *module.split('.')).with_suffix('.py').is_file(), module
        return
    start = next(i for i, word in enumerate(words) if word.endswith('.py'))
    script, *args = words[start:]
    assert Path(script).is_file(), script
    if script.startswith('examples/'):
        assert not args
    elif not script.startswith('tests/'):
        expanded = [word for arg in args for word in expand(arg)]
        parse(script, expanded)
        check_configs(expanded)


def check_configs(words):
    for word in words:
        for config in re.findall(r'configs/\S+?\.py', word):
            assert Path(config).is_file(), config


def expand(word):
    """``a{1,2}b`` as a shell has it."""
    if not (found := re.fullmatch(r'(.*)\{([\w,]+)\}(.*)', word)):
        return [word]
    return [f'{found[1]}{part}{found[3]}' for part in found[2].split(',')]


def check_mim(words, parse):
    command, package, config, *rest = words
    if command == 'run':
        assert package == 'man_mm'
        (script,) = Path('tools').rglob(f'{config}.py')  # as mim looks for it
        check_python([str(script), *rest], parse)
        return
    assert command in ('train', 'test') and package in (
        'mmdet',
        'mmpretrain',
        'mmagic',
        'man_mm',
    )
    has_package = package != 'mmagic' or find_spec('mmagic')  # not beside the forks
    if is_placeholder(config) or not has_package:
        return
    stock = Path(find_spec(package).origin).parent / '.mim/configs'
    path = Path(config)
    # A file that the page itself tells to write.
    if not path.is_file() and path.name != 'my_config.py':
        (path,) = stock.rglob(path.name)
    if path.is_file() and '--cfg-options' in rest:
        options = dict(
            word.split('=', 1) for word in rest if re.match(r'\w+[\w.]*=', word)
        )
        merged = Config.fromfile(path)
        merged.merge_from_dict(options)
        if 'optim_wrapper.type' in options:
            check_local_learning(merged)
    flags = {word for word in rest if word.startswith('--')}
    assert flags <= {
        '--cfg-options',
        '--gpus',
        '--launcher',
        '--work-dir',
        '--resume',
        '--amp',
        '--checkpoint',
        '--show-dir',
    }


def check_local_learning(cfg):
    local = cfg.optim_wrapper.get('local_learning', {})
    for key in ('micro_batch_size',):  # numbers are strings here
        if key in local:
            local[key] = int(local[key])
    LocalLearningOptimWrapperConstructor(cfg.optim_wrapper)
    root.HOOKS.build(cfg.default_hooks.memory_bank)


def check_make(words, _parse):
    makefile = Path('Makefile').read_text()
    targets = re.findall(r'^(\w+):', makefile, re.MULTILINE)
    settings = re.findall(r'^(\w+ )\?=', makefile, re.MULTILINE)
    known = {*targets, *(setting.strip() for setting in settings)}
    assert {word.partition('=')[0] for word in words} <= known


def check_pip(words, _parse):
    extras = {name for word in words for name in re.findall(r'\[([\w-]+)\]', word)}
    assert all(Path(f'requirements/{name}.txt').is_file() for name in extras)


def check_pytest(words, _parse):
    assert all(Path(word).exists() for word in words)


def test_commands_exist(parse):
    for document in DOCUMENTS:
        for words in commands(document.read_text()):
            try:
                check_command(words, parse)
            except (ValueError, AssertionError) as error:
                raise AssertionError(f'{document}: {shlex.join(words)}') from error


@pytest.mark.parametrize(
    'command',
    [
        'python tools/no_such_tool.py',
        'PYTHONPATH=examples python -m memory_leads.no_such_module',
        'mim run man_mm plan_partition X.py --num-modules 4 --no-such-flag',
        'mim run man_mm plan_partition X.py --num-modules many',
        'mim run man_mm plan_partition configs/man/no_such.py --num-modules 4',
        'mim run man_mm no_such_tool',
        'mim train mmdet no_such_config.py',
        'mim train mmdet retinanet_r50_fpn_1x_coco.py --no-such-flag',
        'mim train mmdet retinanet_r50_fpn_1x_coco.py --cfg-options '
        'optim_wrapper.type=man_mm.LocalLearningOptimWrapper '
        'optim_wrapper.local_learning.no_such_key=1',
        'make no_such_target',
        'make test NO_SUCH_SETTING=1',
        "pip install '.[no_such_extra]'",
        'pytest tests/no_such_test.py',
        'no_such_program',
    ],
)
def test_commands_that_do_not_exist(command, parse):
    (words,) = commands(f'```bash\n{command}\n```\n')
    with pytest.raises((ValueError, AssertionError)):
        check_command(words, parse)
