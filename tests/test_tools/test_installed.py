"""The tools of an installed package, by ``mim run man_mm NAME`` outside a clone.

On the forks, whose mim does not find them, by ``python -m man_mm NAME``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packages import ON_FORKS, ROOT, run_python
from scripts import TOOLS

MIM = [Path(sys.executable).with_name('mim'), 'run', 'man_mm']
MODULE = [sys.executable, '-m', 'man_mm']
DEMO = 'configs/man/retinanet_r18_man_demo.py'  # one that is installed
STOCK = 'configs/end_to_end/retinanet_r18_demo.py'
SIZE = ['--size', '64', '64', '--batch', '2']


@pytest.fixture
def mim_run(installed, tmp_path):
    """Runs a tool outside of any clone; it must be the installed one."""
    env = {**os.environ, 'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1'}

    def run(name, *args, status=0):
        command = [*(MODULE if ON_FORKS else MIM), name, *args]
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == (status == 0), output[-3000:]
        if not ON_FORKS:
            assert f'Use the script {installed}/man_mm/.mim/tools/' in output
        return output

    return run


def test_the_planner_and_the_benchmark(mim_run, tmp_path):
    output = mim_run(
        'plan_partition', DEMO, '--num-modules', 2, *SIZE, '--out', 'cut.py'
    )
    assert 'of end-to-end training' in output
    # The new config names an installed one as its base, and is found where it is.
    schemes = ['--schemes', 'end-to-end', 'local']
    output = mim_run('benchmark', 'cut.py', *SIZE, '--repeats', 1, *schemes)
    assert re.search(r'local +│.*│', output)
    assert len(list(tmp_path.iterdir())) == 1


def test_data_are_made_and_trainings_compared(mim_run, tmp_path):
    numbers = ['--num-train', 4, '--num-val', 2, '--size', 64]
    mim_run('make_digits', *numbers)
    output = mim_run(
        'compare',
        f'MAN={DEMO}',
        *('--seeds', 0, '--out', 'results', '--cfg-options'),
        *('train_cfg.max_iters=2', 'train_cfg.val_interval=2'),
        *('default_hooks.checkpoint.interval=2', 'default_hooks.logger.interval=1'),
        *('train_dataloader.batch_size=2', 'model.test_cfg.score_thr=0'),
    )
    assert 'coco/bbox_mAP' in output
    assert (tmp_path / 'results/man_seed0.json').is_file()


def test_a_stock_config_is_trained_by_options_and_tested(mim_run):
    mim_run('make_digits', '--num-train', 4, '--num-val', 2, '--size', 64)
    small = ['train_dataloader.batch_size=2', 'model.test_cfg.score_thr=0']
    output = mim_run(
        'train',
        *(STOCK, '--work-dir', 'first', '--cfg-options', *small),
        'optim_wrapper.type=man_mm.LocalLearningOptimWrapper',
        'optim_wrapper.constructor=man_mm.LocalLearningOptimWrapperConstructor',
        'default_hooks.memory_bank.type=man_mm.MemoryBankHook',
        *('train_cfg.max_iters=2', 'train_cfg.val_interval=2'),
        'default_hooks.checkpoint.interval=2',
    )
    assert 'Local learning: K = 4' in output
    output = mim_run('test', STOCK, 'first/iter_2.pth', '--cfg-options', small[1])
    assert 'coco/bbox_mAP' in output and 'Local learning' not in output


def test_the_leaderboard_needs_a_clone(mim_run):
    output = mim_run('leaderboard', 'check', status=1)
    assert 'give that as --root' in output
    assert 'entries: no error' in mim_run('leaderboard', '--root', ROOT, 'validate')


def test_a_config_that_is_nowhere_is_named(mim_run):
    output = mim_run('plan_partition', 'no_such.py', '--num-modules', 2, status=1)
    assert "There is no config 'no_such.py', neither in" in output


def test_the_module_runs_the_tools_of_the_clone(tmp_path):
    numbers = ['--num-train', 2, '--num-val', 1, '--size', 64]
    run_python('-m', 'man_mm', 'make_digits', '--out', tmp_path / 'digits', *numbers)
    assert (tmp_path / 'digits/train').is_dir()
    for name in ('no_such_tool', 'setup_env', '__main__'):
        with pytest.raises(AssertionError, match='one of benchmark, '):
            run_python('-m', 'man_mm', name)


def test_every_tool_has_a_name_of_its_own():
    """By which mim finds it: it takes the first file of a name."""
    names = [path.name for path in TOOLS.rglob('*.py') if 'setup_env' not in path.parts]
    assert len(names) == len(set(names)) >= 15


def test_tools_are_sorted():
    """Folders by purpose, few files beside them, nothing that only looks private."""
    files = [path.name for path in TOOLS.iterdir() if path.is_file()]
    assert sorted(files) == [
        'dist_test.sh',
        'dist_train.sh',
        'slurm_test.sh',
        'slurm_train.sh',
        'test.py',
        'train.py',
    ]
    for path in TOOLS.rglob('*.py'):
        assert path.name == '__main__.py' or not path.name.startswith('_')
        assert 'sys.path' not in path.read_text('utf-8')
