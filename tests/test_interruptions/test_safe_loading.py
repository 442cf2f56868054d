"""Checkpoints of mmengine load with the safe loading of torch on."""

import io
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from man_mm.interruptions.safe_loading import _method, allow_safe_loading


def load(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_what_mmengine_pickles_loads_safely():
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 4):
        buffer.update(value)
    loaded = load(
        dict(
            message_hub=dict(log_scalars={'train/loss': buffer}, eta=np.float64(3.5)),
            param_schedulers=[dict(anneal_func=OneCycleParamScheduler._annealing_cos)],
        )
    )
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer) and history.mean() == pytest.approx(7 / 3)


def test_they_load_after_others_have_taken_the_permission_away():
    buffer = HistoryBuffer()
    buffer.update(1.0)
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray, np.dtype]):
        pass  # as onedl-mmengine loads a checkpoint
    with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
        load(buffer)
    allow_safe_loading()
    assert isinstance(load(buffer), HistoryBuffer)


def test_other_attributes_are_refused():
    class Attack:
        def __reduce__(self):
            return getattr, (torch.Tensor, 'numpy')

    with pytest.raises((pickle.UnpicklingError, ValueError), match='refused'):
        load(Attack())
    for owner, name in ((HistoryBuffer, '__init__'), (dict, 'get')):
        with pytest.raises(ValueError, match='refused'):
            _method(owner, name)
