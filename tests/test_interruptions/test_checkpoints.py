"""Checkpoints load with the safe loading of torch 2.6 and later switched on."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from man_mm.engine.compat import _method
from man_mm.interruptions.plain_data import from_plain_data, to_plain_data


def checkpoint():
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 4):
        buffer.update(value)
    return dict(
        state_dict={'weight': torch.ones(2)},
        message_hub=dict(
            log_scalars={'train/loss': buffer},
            runtime_info={'eta': np.float64(3.5), 'iter': 7},
            resumed_keys={},
        ),
        param_schedulers=[
            dict(anneal_func=OneCycleParamScheduler._annealing_cos, last_step=3)
        ],
    )


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


def test_what_mmengine_pickles_loads_safely():
    loaded = torch.load(saved(checkpoint()), weights_only=True)
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer) and history.mean() == pytest.approx(7 / 3)


def test_other_attributes_are_refused():
    class Attack:
        def __reduce__(self):
            return getattr, (torch.Tensor, 'numpy')

    with pytest.raises((pickle.UnpicklingError, ValueError), match='refused'):
        torch.load(saved(Attack()), weights_only=True)
    for owner, name in ((HistoryBuffer, '__init__'), (dict, 'get')):
        with pytest.raises(ValueError, match='refused'):
            _method(owner, name)


def test_plain_data_comes_back_as_it_was():
    content, original = checkpoint(), checkpoint()
    to_plain_data(content)
    from_plain_data(content)
    before = original['message_hub']['log_scalars']['train/loss']
    after = content['message_hub']['log_scalars']['train/loss']
    for a, b in zip(before.data, after.data, strict=True):
        assert np.array_equal(a, b)
    assert content['message_hub']['runtime_info'] == {'eta': 3.5, 'iter': 7}
    assert content['param_schedulers'] == [{'last_step': 3}]


@pytest.mark.parametrize('plain', [True, False])
def test_stock_tools_read_plain_data(plain, tmp_path):
    content = checkpoint()
    if plain:
        to_plain_data(content)
    torch.save(content, tmp_path / 'model.pth')
    code = f"import torch; torch.load(r'{tmp_path / 'model.pth'}', weights_only=True)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True)
    assert (done.returncode == 0) == plain  # False is the control
