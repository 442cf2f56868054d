"""Numbers and names in the documents are those of the files that they come from."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from man_mm.leaderboard import board
from man_mm.leaderboard.documents import documents

FOLDERS = [path.parent.name for path in sorted(Path('configs').glob('*/README.md'))]


def test_every_number_comes_from_a_result():
    assert board.check(Path('.')) == []


@pytest.fixture
def copy(tmp_path):
    """What the leaderboard reads and writes, to be changed."""
    shutil.copytree('benchmarks', tmp_path / 'benchmarks')
    for path in (*documents(Path('.')), *Path('configs').glob('*/metafile.yml')):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path)
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ('name', 'old', 'new', 'error'),
    [
        ('README.md', '| 267.8 MiB |', '| 277.8 MiB |', 'but the results give'),
        ('docs/memory.md', '| 0.259 |', '| 0.359 |', 'but the results give'),
        ('docs/memory.md', 'Every table', '\n| a | 1.5 |\n', 'comes from no result'),
        ('docs/memory.md', '<!-- end of results -->', '', 'but the results give'),
        ('docs/memory.md', 'results: steps', 'results: stairs', 'write one of steps'),
        ('docs/memory.md', 'steps resnet50', 'steps resnet49', 'has none'),
        (
            'configs/man/README.md',
            '34.629 ± 0.119',
            '34.929 ± 0.119',
            'README.md: line',
        ),
        ('configs/man/metafile.yml', 'PSNR: 34.6292', 'PSNR: 35.6292', 'metafile.yml'),
        (
            'benchmarks/results/retinanet_r50_man_coco_608x972_b1/local.json',
            '"peak": 280852486',
            '"peak": 180852486',
            'memory.peak: 280852486, but the sources say 180852486',
        ),
        (
            'benchmarks/results/training/edsr_x2_photos/man_seed1.json',
            '"PSNR": 34.',
            '"PSNR": 36.',
            'metrics.PSNR.mean: 34.6291',
        ),
        (
            'benchmarks/results/super-resolution/edsr_x2_photos-man.json',
            '"mean": 34.6',
            '"mean": 34.7',
            'metrics.PSNR.mean: 34.7291',
        ),
    ],
)
def test_a_changed_number_is_noticed(copy, name, old, new, error):
    assert board.check(copy) == []
    change(copy / name, old, new)
    assert error in '\n'.join(board.check(copy))


def test_build_writes_the_tables_again(copy, tmp_path):
    before = {path: path.read_text() for path in documents(copy)}
    for name in ('README.md', 'docs/memory.md'):
        change(copy / name, '| 267.8 MiB |', '| 277.8 MiB |')
    changed = board.build(copy)
    assert [path.name for path in changed] == ['README.md', 'memory.md']
    assert {path: path.read_text() for path in documents(copy)} == before
    assert board.build(copy) == []


@pytest.mark.parametrize('folder', FOLDERS)
def test_the_metafile_lists_every_config(folder):
    text = Path('configs', folder, 'metafile.yml').read_text()
    models = yaml.safe_load(text)['Models']
    listed = {model['Config']: model['Name'] for model in models}
    configs = {str(path): path.stem for path in Path('configs', folder).glob('*.py')}
    assert listed == configs
    card = Path('configs', folder, 'README.md').read_text()
    assert all(name in card for name in configs.values())
    index = yaml.safe_load(Path('model-index.yml').read_text())['Import']
    assert f'configs/{folder}/metafile.yml' in index


@pytest.mark.usefixtures('mmagic')
def test_metafiles_use_the_words_of_openmmlab():
    """Tasks and metrics are those that stock metafiles name, but for AP50."""
    tasks, metrics = set(), set()
    for path in Path('configs').glob('*/metafile.yml'):
        for model in yaml.safe_load(path.read_text())['Models']:
            for row in model.get('Results', ()):
                tasks.add(row['Task'])
                metrics.update(row['Metrics'])
    stock = ''
    for name in ('mmdet', 'mmpretrain', 'mmagic'):
        folder = Path(find_spec(name).submodule_search_locations[0]) / '.mim/configs'
        stock += ''.join(path.read_text() for path in folder.glob('*/metafile.yml'))
    assert tasks and all(f'Task: {task}' in stock for task in tasks)
    assert all(f' {name}: ' in stock for name in metrics - {'box AP50'})


def test_links_of_the_documents_exist():
    for document in documents(Path('.')):
        for link in re.findall(r'\]\(([^)#]+)', document.read_text()):
            if not link.startswith('http'):
                assert (document.parent / link).exists(), link
