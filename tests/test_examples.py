"""The examples in plain PyTorch learn, and in several processes learn the same."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'
PLAIN_LOOP = EXAMPLES / 'plain_loop.py'


def test_plain_loop_learns(capsys):
    accuracy = runpy.run_path(str(PLAIN_LOOP))['main'](epochs=3)
    assert accuracy >= 0.9
    epochs = [
        [float(value) for value in re.findall(r'(?:module\d+|loss) (\d\.\d+)', line)]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [len(losses) for losses in epochs] == [3, 3, 3]  # two local, and the last
    assert all(last < first for first, last in zip(epochs[0], epochs[-1], strict=True))


def test_the_pipeline_learns_what_the_plain_loop_learns():
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc-per-node', '3', str(EXAMPLES / 'pipeline_loop.py')]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    (found,) = re.findall(r'accuracy (\d\.\d+)', result.stdout)
    plain = runpy.run_path(str(PLAIN_LOOP))['main']
    assert found == f'{plain(epochs=3):.3f}'
    assert found != f'{plain(epochs=1):.3f}'  # control
