"""The example in plain PyTorch learns, with every one of its modules."""

import re
import runpy
from pathlib import Path

import torch

torch.set_num_threads(1)

PLAIN_LOOP = Path(__file__).resolve().parent.parent / 'examples' / 'plain_loop.py'


def test_plain_loop_learns(capsys):
    accuracy = runpy.run_path(str(PLAIN_LOOP))['main'](epochs=3)
    assert accuracy >= 0.9
    epochs = [
        [float(value) for value in re.findall(r'(?:module\d+|loss) (\d\.\d+)', line)]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [len(losses) for losses in epochs] == [3, 3, 3]  # two local, and the last
    assert all(last < first for first, last in zip(epochs[0], epochs[-1], strict=True))
