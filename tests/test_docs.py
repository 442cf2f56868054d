"""The documents: their code runs, and their links lead somewhere."""

import json
import re
import runpy
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
import torch
from documents import DOCUMENTS, NOTEBOOK, PAGES, blocks
from mmengine import registry as root
from mmengine.config import Config
from torch import distributed as dist

from man_mm import LocalLearningOptimWrapperConstructor
from man_mm.parallel import ModulePipeline

matplotlib.use('Agg')

PIPELINE = Path('docs/pipeline.md')
PAGE = 'page'  # name of the module that a page is run as


# Python


@pytest.fixture
def tidy():
    """Removes what pages register, and keeps the random state."""
    from man_mm.backbones.base import ADAPTERS

    adapters = dict(ADAPTERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    for name, component in list(root.MODELS.module_dict.items()):
        if component.__module__ == PAGE:
            del root.MODELS.module_dict[name]
    ADAPTERS.clear()
    ADAPTERS.update(adapters)


def run_python(text, folder, namespace=None):
    """Runs a page's blocks in order; those with a base are loaded as configs."""
    namespace = {'__name__': PAGE, **(namespace or {})}
    for number, block in enumerate(blocks(text, 'python')):
        if "_base_ = 'mmagic::" in block and find_spec('mmagic') is None:
            continue  # not beside the forks
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


# The map of the rooms


def test_the_map_has_the_layers_of_the_contract():
    contract = re.search(
        r'^layers = \[\n(.*?)^\]', Path('pyproject.toml').read_text(), re.M | re.S
    )
    layers = [
        name
        for line in re.findall(r"'(.+)'", contract[1])
        for name in line.split(' | ')
    ]
    folders = [name for name in layers if Path('man_mm', name).is_dir()]
    page = Path('docs/contributing.md').read_text()
    rooms = re.findall(r'^\| `man_mm/(\w+)/`', page, re.M)
    assert rooms == folders


# The notebook


def test_the_notebook_trains(tmp_path, monkeypatch, tidy):
    import matplotlib.pyplot as plt

    cells = json.loads(NOTEBOOK.read_text())['cells']
    settings, *others = [
        ''.join(c['source']) for c in cells if c['cell_type'] == 'code'
    ]
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
