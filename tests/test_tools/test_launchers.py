"""The shell scripts that start several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import TOOLS

SLURM = [
    (
        'slurm_train.sh',
        ['config.py', 'out', '--amp'],
        'train.py config.py --work-dir out --launcher slurm --amp',
    ),
    (
        'slurm_test.sh',
        ['config.py', 'x.pth', '--tta'],
        'test.py config.py x.pth --launcher slurm --tta',
    ),
]
DIST = [
    (
        'dist_train.sh',
        ['config.py', '2', '--resume', 'auto'],
        'train.py config.py --launcher pytorch --resume auto',
    ),
    (
        'dist_test.sh',
        ['config.py', 'x.pth', '2', '--out', 'a b.pkl'],
        'test.py config.py x.pth --launcher pytorch --out a b.pkl',
    ),
]


def run(script, args, folder, program, **env):
    """Runs a launcher with a stand-in for a program, which prints its arguments."""
    stub = folder / program
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    path = f'{folder}:{os.environ["PATH"]}'
    return subprocess.run(
        [str(TOOLS / script), *args],
        env={**os.environ, **env, 'PATH': path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(('script', 'args', 'command'), SLURM)
def test_slurm(script, args, command, tmp_path):
    args = ['part', 'job', *args]
    done = run(script, args, tmp_path, 'srun', GPUS='4', SRUN_ARGS='--quiet -t 5')
    assert done.returncode == 0, done.stderr
    assert f'python -u {TOOLS}/{command}\n' in done.stdout
    words = '-p part --job-name=job --gres=gpu:4 --ntasks=4 --ntasks-per-node=4'
    assert words in done.stdout and '--quiet -t 5' in done.stdout
    done = run(script, args, tmp_path, 'srun', GPUS='16')
    assert '--gres=gpu:8 --ntasks=16 --ntasks-per-node=8' in done.stdout


@pytest.mark.parametrize(('script', 'args', 'command'), DIST)
def test_torchrun(script, args, command, tmp_path):
    done = run(script, args, tmp_path, 'python', PORT='12345', NNODES='3')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('-m torch.distributed.run --nnodes 3 --node_rank 0 ')
    assert '--master_port 12345 --nproc_per_node 2 ' in done.stdout
    assert done.stdout.endswith(f'{TOOLS}/{command}\n')


@pytest.mark.parametrize('script', [row[0] for row in SLURM + DIST])
def test_missing_arguments_are_named(script, tmp_path):
    done = run(script, ['one'], tmp_path, 'python')
    assert done.returncode != 0
    assert 'give ' in done.stderr and done.stdout == ''


def test_two_real_processes(tmp_path):
    """They find each other, and the script."""
    (tmp_path / 'config.py').write_text('')
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    done = subprocess.run(
        [str(TOOLS / 'dist_train.sh'), 'no_such.py', '2'],
        cwd=tmp_path,
        env={**env, 'PORT': '29613', 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "There is no config 'no_such.py'" in done.stderr
