"""What the demo trains, measures and says."""

import io
import sys

import pytest
from mmengine.config import Config
from rich.console import Console

from man_mm.benchmark import demo, demo_training
from man_mm.engine.config_files import find_config


def record():
    def row(peak, seconds, **scores):
        return dict(peak_bytes=peak * 2**20, step_seconds=seconds, **scores)

    results = {
        'end-to-end': row(40, 0.2, mAP=0.6, AP50=0.8),
        'exact checkpointing': row(10, 0.3),
        'joint': row(20, 0.25, mAP=0.625, AP50=0.85),
        'local learning': row(30, 0.2, mAP=0.59, AP50=0.79),
    }
    return dict(seed=3, results=results)


def shown(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_has_a_row_for_each_way():
    table = shown(demo.make_table(record()))
    rows = [line for line in table.splitlines() if '0.' in line]
    cells = [[x.strip() for x in row.strip('│').split('│')] for row in rows]
    exact = ['exact checkpointing', '0.600', '0.800', '10.0', '0.25', '0.300', '1.50']
    assert cells[1] == exact  # the accuracy of end-to-end training
    assert cells[2][:2] == ['joint', '0.625'] and len(cells) == 4


def test_a_sentence_says_what_the_numbers_mean():
    text = demo.explain(record())
    assert 'joint 50% of the memory in 125% of the time' in text
    assert 'joint +0.025, local learning -0.010; joint is best' in text


@pytest.mark.parametrize(
    'name', [name for name, way in demo.WAYS.items() if way.config]
)
def test_ways_are_configs_that_load(name):
    config, *options = demo.WAYS[name].arguments(seed=7)
    cfg = Config.fromfile(find_config(config))
    cfg.merge_from_dict(dict(option.split('=') for option in options))
    wrapper = cfg.optim_wrapper
    is_local = wrapper.get('type') == 'LocalLearningOptimWrapper'
    assert cfg.randomness.seed == '7' and is_local == (name != 'end-to-end')
    expected = {'joint': '0.0', 'local, then joint': '0.5'}.get(name)
    assert wrapper.get('local_learning', {}).get('end_to_end_from') == expected


def test_costs_of_a_mixture_are_the_highest_peak_and_the_mean_time():
    costs = dict(local=dict(peak=3, seconds=[1, 2, 9]), joint=dict(peak=4, seconds=[4]))
    found = demo._costs_of(demo.WAYS['local, then joint'], costs)
    assert found == dict(peak_bytes=4, step_seconds=3)


TRAINING = """
import os, sys
name = sys.argv[sys.argv.index('--work-dir') + 1]
for step in (100, 150, 200):
    print(f'Iter(train) [{step}/200]  eta: 0:00:01')
print('threads', os.environ['OMP_NUM_THREADS'])
sys.exit('bad' in name)
"""


@pytest.fixture
def mim(tmp_path, monkeypatch):
    """A stand-in for mim, whose trainings take minutes."""
    script = tmp_path / 'mim'
    script.write_text(f'#!{sys.executable}\n{TRAINING}')
    script.chmod(0o755)
    monkeypatch.setattr(demo_training.sys, 'executable', str(tmp_path / 'python'))


def test_trainings_tell_how_far_they_are(mim, tmp_path):
    console = Console(file=io.StringIO())
    runs = {name: [demo.PLAIN, 'randomness.seed=0'] for name in ('a, b', 'c')}
    found = demo_training.train_all(runs, tmp_path, console)
    assert found == {'a, b': tmp_path / 'a_b', 'c': tmp_path / 'c'}
    lines = console.file.getvalue().splitlines()
    assert sorted(lines) == [
        f'{name}: {done} of 200 iterations' for name in runs for done in (100, 200)
    ]


def test_a_training_that_fails_is_told_with_its_log(mim, tmp_path):
    runs = {'bad': [demo.PLAIN]}
    with pytest.raises(RuntimeError, match=r'(?s)\[200/200\].*bad: training failed'):
        demo_training.train_all(runs, tmp_path, Console(file=io.StringIO()))
