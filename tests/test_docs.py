"""The documents: their code runs, and what they name exists and is true."""

import argparse
import inspect
import json
import re
import runpy
import shlex
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
import torch
from mmengine import registry as root
from mmengine.config import Config
from torch import distributed as dist

from man_mm import LocalLearningOptimWrapperConstructor
from man_mm.core import ModulePipeline
from man_mm.engine.options import DEFAULTS

matplotlib.use('Agg')

RESULTS, MIB = Path('benchmarks/results'), 2**20
PAGES = sorted(Path('docs').glob('*.md'))
CARDS = sorted(Path('configs').glob('*/README.md'))
DOCUMENTS = [Path('README.md'), Path('CHANGELOG.md'), *PAGES, *CARDS]
NOTEBOOK = Path('examples/local_learning.ipynb')
OPTIONS, PARTITIONS = Path('docs/options.md'), Path('docs/partitions.md')
PIPELINE = Path('docs/pipeline.md')
PAGE = 'page'  # name of the module that a page is run as
# What others than a config give to a component.
GIVEN = {'site', 'optimizer', 'learner', 'measure', 'module'}
GIVEN |= {'optim_wrapper_cfg', 'paramwise_cfg'}
REGISTRIES = ('MODELS', 'HOOKS', 'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS')
REGISTRIES += ('TASK_UTILS', 'MODEL_WRAPPERS', 'DATASETS')


def blocks(text, language):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


# Python


@pytest.fixture
def tidy():
    """Removes what pages register, and keeps the random state."""
    from man_mm.backbones.base import _ADAPTERS

    adapters = dict(_ADAPTERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    for name, component in list(root.MODELS.module_dict.items()):
        if component.__module__ == PAGE:
            del root.MODELS.module_dict[name]
    _ADAPTERS.clear()
    _ADAPTERS.update(adapters)


def run_python(text, folder, namespace=None):
    """Runs a page's blocks in order; those with a base are loaded as configs."""
    namespace = {'__name__': PAGE, **(namespace or {})}
    for number, block in enumerate(blocks(text, 'python')):
        if '_base_ = ' in block:
            check_config(block, folder / f'block{number}.py')
        else:
            exec(compile(block, f'block {number}', 'exec'), namespace)


def check_config(block, path):
    path.write_text(block)
    for base in re.findall(r"_base_ = '(configs/[^']+)'", block):
        path.write_text(block.replace(base, str(Path(base).resolve())))
    cfg = Config.fromfile(path)
    LocalLearningOptimWrapperConstructor(cfg.optim_wrapper)
    root.HOOKS.build(cfg.default_hooks.memory_bank)


@contextmanager
def surroundings(page):
    """What the code of a page takes for granted."""
    if page != PIPELINE:
        yield {}
        return
    example = runpy.run_path('examples/plain_loop.py')
    learner = example['build']()
    images, labels, *_ = example['load_digits_as_tensors']()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dict(
            ModulePipeline=ModulePipeline,
            F=torch.nn.functional,
            learner=learner,
            loader=[(images[:8], labels[:8])],
            model=learner.model,
            torch=torch,
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('page', [Path('README.md'), *PAGES], ids=str)
def test_python_blocks_run(page, tmp_path, tidy):
    with surroundings(page) as namespace:
        run_python(page.read_text(), tmp_path, namespace)


def test_python_blocks_that_fail(tmp_path, tidy):
    good = Path('docs/aux_heads.md').read_text()
    with pytest.raises(KeyError):
        run_python(
            good.replace('for name in self.names]', "for name in ['x']]"), tmp_path
        )
    config = Path('docs/add_to_config.md').read_text()
    with pytest.raises(ValueError, match='unknown keys'):
        run_python(config.replace('partition=', 'partitions='), tmp_path)


# Commands


class Parsed(Exception):
    pass


def parser_of(script, monkeypatch):
    """The argument parser that a script builds when it is called."""
    monkeypatch.syspath_prepend(str(Path(script).parent))
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
    if words == ['tools/setup_env.py']:
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


def check_mim(words, _parse):
    command, package, config, *rest = words
    assert command in ('train', 'test') and package in (
        'mmdet',
        'mmpretrain',
        'mmagic',
        'man_mm',
    )
    if is_placeholder(config):
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
    targets = re.findall(r'^(\w+):', Path('Makefile').read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def check_pip(words, _parse):
    extras = {name for word in words for name in re.findall(r'\[(\w+)\]', word)}
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
        'python tools/plan_partition.py X.py --num-modules 4 --no-such-flag',
        'python tools/plan_partition.py X.py --num-modules many',
        'python tools/plan_partition.py configs/man/no_such.py --num-modules 4',
        'mim train mmdet no_such_config.py',
        'mim train mmdet retinanet_r50_fpn_1x_coco.py --no-such-flag',
        'mim train mmdet retinanet_r50_fpn_1x_coco.py --cfg-options '
        'optim_wrapper.type=man_mm.LocalLearningOptimWrapper '
        'optim_wrapper.local_learning.no_such_key=1',
        'make no_such_target',
        "pip install '.[no_such_extra]'",
        'pytest tests/no_such_test.py',
        'no_such_program',
    ],
)
def test_commands_that_do_not_exist(command, parse):
    (words,) = commands(f'```bash\n{command}\n```\n')
    with pytest.raises((ValueError, AssertionError)):
        check_command(words, parse)


# Links


def anchors(text):
    """Anchors of the headings, as GitHub makes them."""
    text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE):
        yield re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def broken_links(text, folder):
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        path, _, anchor = link.partition('#')
        if re.match(r'https?:', link):
            continue
        target = folder / path
        if path and not target.exists():
            yield link
        elif anchor:
            page = target.read_text() if path else text
            if anchor not in anchors(page):
                yield link


@pytest.mark.parametrize('document', [*DOCUMENTS, NOTEBOOK], ids=str)
def test_links_and_images_exist(document):
    text = document.read_text()
    assert list(broken_links(text, document.parent)) == []


def test_links_that_are_broken():
    text = '# A b\n[x](no_such.md) [x](#a-b) [x](#c) [x](faq.md#no-such) [x](faq.md)'
    broken = list(broken_links(text, Path('docs')))
    assert broken == ['no_such.md', '#c', 'faq.md#no-such']


def test_the_index_lists_every_page():
    index = Path('docs/README.md').read_text()
    listed = set(re.findall(r'\((\w+\.md)\)', index))
    assert listed == {page.name for page in PAGES} - {'README.md'}


# Options


def components():
    """Components that configs name, with the options that a config may give."""
    for registry in REGISTRIES:
        for name, component in getattr(root, registry).module_dict.items():
            if component.__module__.startswith('man_mm.'):
                yield name, own_options(component)


def own_options(component):
    function = component.__init__ if inspect.isclass(component) else component
    if not getattr(function, '__module__', '').startswith('man_mm.'):
        return {}  # inherited from OpenMMLab, or none
    return {
        name: None if parameter.default is parameter.empty else repr(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in {'self', *GIVEN, *DEFAULTS}
    }


def documented_options(text):
    """By heading of the page: options with their defaults, None if required."""
    parts = re.split(r'^### `?(\w+)`?.*$', text, flags=re.MULTILINE)
    sections = {}
    for name, section in zip(parts[1::2], parts[2::2], strict=True):
        section = re.split(r'^## ', section, flags=re.MULTILINE)[0]
        rows = re.findall(r'^\| `(\w+)` \| (?:`([^`]+)`|required) \|', section, re.M)
        sections[name] = {
            option: repr(eval(default)) if default else None for option, default in rows
        }
    return sections


def wrong_options(text):
    """What the page lacks, has too much, or tells wrong."""
    expected = {'local_learning': {k: repr(v) for k, v in DEFAULTS.items()}}
    expected.update(components())
    found = documented_options(text)
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            yield name
        else:
            options = {*expected[name], *found[name]}
            for option in sorted(options):
                default = expected[name].get(option, 'no such option')
                if option not in found[name] or found[name][option] != default:
                    yield f'{name}.{option}'


def test_every_option_stands_in_the_page_with_its_default():
    assert list(wrong_options(OPTIONS.read_text())) == []


def test_options_that_are_missing_or_wrong():
    text = OPTIONS.read_text()
    lacks = re.sub(r'^\| `clip` .*\n', '', text, flags=re.MULTILINE)
    assert list(wrong_options(lacks)) == ['local_learning.clip']
    wrong = text.replace("| `fusion` | `'concatenate'`", "| `fusion` | `'add'`")
    assert list(wrong_options(wrong)) == ['MANClsHead.fusion']
    extra = text.replace('| `fusion` |', '| `fission` | `1` |\n| `fusion` |')
    assert list(wrong_options(extra)) == ['MANClsHead.fission']
    gone = text.replace('### `InfoProHead`', '### Other')
    assert 'InfoProHead' in list(wrong_options(gone))
    assert (
        DEFAULTS['update']
        == inspect.signature(root.OPTIM_WRAPPERS.get('LocalLearningOptimWrapper'))
        .parameters['update']
        .default
    )


# The ladder


def ladder_tables(text):
    """Tables under each link to results of a ladder: rows of cells by column."""
    parts = re.split(r'\(\.\./benchmarks/results/(ladder/\w+)\)', text)
    for folder, part in zip(parts[1::2], parts[2::2], strict=True):
        for table in re.findall(r'(?:^\|.*\n)+', part, re.MULTILINE):
            header, _, *rows = [
                [cell.strip() for cell in line.strip('|\n').split('|')]
                for line in table.splitlines()
            ]
            if 'scheme' in header:
                yield folder, [dict(zip(header, row, strict=True)) for row in rows]


def wrong_rows(text):
    """Rows of ladders that differ from the result file of their scheme."""
    for folder, rows in ladder_tables(text):
        records = [json.loads(p.read_text()) for p in (RESULTS / folder).glob('*.json')]
        by_scheme = {record['scheme']: record for record in records}
        above = None
        for row in rows:
            record = by_scheme[row['scheme'].strip('`')]
            peak = record['peak'] / MIB
            expected = {
                'peak, MiB': f'{peak:.1f}',
                'change': ''
                if above is None
                else f'{round(peak - above, 1) + 0.0:+.1f}',
                'ratio': f'{record["peak_ratio"]:.3f}',
                'FLOPs': f'{record["flops_ratio"]:.3f}',
            }
            above = peak
            if any(row.get(key, value) != value for key, value in expected.items()):
                yield row


@pytest.mark.parametrize('page', [OPTIONS, PARTITIONS], ids=str)
def test_ladders_are_the_result_files(page):
    text = page.read_text()
    count = sum(len(rows) for _, rows in ladder_tables(text))
    assert count >= 5
    assert list(wrong_rows(text)) == []
    for column in (r'\d+\.\d', r'\d\.\d{3}'):  # peaks; ratios and FLOPs
        changed = re.sub(rf'\| ({column}) \|', r'| 7\1 |', text)
        assert len(list(wrong_rows(changed))) == count


# The notebook


def test_the_notebook_trains(tmp_path, monkeypatch, tidy):
    import matplotlib.pyplot as plt

    cells = json.loads(NOTEBOOK.read_text())['cells']
    settings, *others = [
        ''.join(c['source']) for c in cells if c['cell_type'] == 'code'
    ]
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    namespace = {}
    exec(settings, namespace)
    namespace.update(
        DATA=str(tmp_path / 'digits'),
        WORK_DIR=str(tmp_path / 'work_dirs'),
        ITERATIONS=6,
        TRAIN_IMAGES=8,
        VAL_IMAGES=5,
        BATCH=2,
    )
    for number, cell in enumerate(others):
        exec(compile(cell, f'cell {number + 2}', 'exec'), namespace)
    plt.close('all')
    rows, scores = namespace['rows'], namespace['scores']
    assert rows['local'][-1]['step'] == 5
    assert 'module1/loss' in rows['local'][0]
    assert 'module1/loss' not in rows['end-to-end'][0]  # control
    assert set(scores) == {'end-to-end', 'local'}
    assert namespace['panels'].size == 5


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 300_000
