"""Scalars that wait on their device until somebody looks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from reads import count_reads

from man_mm.engine import scalars
from man_mm.engine.scalars import ScalarLog


@pytest.fixture
def hub():
    return MessageHub('test_scalars', log_scalars={}, runtime_info={})


def add(log, *values, name='train/loss'):
    for value in values:
        log.add({name: torch.tensor(value), 'train/other': torch.tensor(7.0)})


def test_they_are_read_at_once_when_one_is_looked_at(hub):
    log = ScalarLog(hub)
    with count_reads() as reads:
        add(log, 1.0, 2.0, 6.0)
        assert not reads
        assert hub.get_scalar('train/loss').mean(2) == 4
        assert hub.get_scalar('train/other').current() == 7
    assert len(reads) == 1
    with count_reads() as reads:  # control
        hub.update_scalar('train/loss', torch.tensor(1.0))
    assert len(reads) == 1


def test_they_are_those_of_the_hub_itself(hub):
    plain = MessageHub('plain', log_scalars={}, runtime_info={})
    log = ScalarLog(hub)
    for value in (1.0, 0.1, 1e-9):
        add(log, value)
        plain.update_scalar('train/loss', torch.tensor(value))
    ours, theirs = (x.get_scalar('train/loss') for x in (hub, plain))
    for a, b in zip(ours.data, theirs.data, strict=True):
        assert np.array_equal(a, b)
    hub.update_scalar('train/loss', 5.0)  # by somebody else
    add(log, 9.0)
    assert list(ours.data[0][-2:]) == [5, 9]


def test_they_are_saved_as_plain_histories_and_go_on(hub):
    log = ScalarLog(hub)
    add(log, 1.0, 2.0)
    saved = hub.state_dict()['log_scalars']
    for buffer in (saved['train/loss'], copy.deepcopy(hub.get_scalar('train/loss'))):
        assert type(buffer) is HistoryBuffer
        assert type(pickle.loads(pickle.dumps(buffer))) is HistoryBuffer
        assert list(buffer.data[0]) == [1, 2] and list(buffer.data[1]) == [1, 1]
    hub.load_state_dict(dict(log_scalars=saved, runtime_info={}, resumed_keys={}))
    add(log, 3.0)
    assert list(hub.get_scalar('train/loss').data[0]) == [1, 2, 3]


def test_few_wait(hub, monkeypatch):
    monkeypatch.setattr(scalars, '_MOST_WAITING', 3)
    log = ScalarLog(hub)
    with count_reads() as reads:
        add(log, *[0.0] * 7)
    assert len(reads) == 2
    assert len(hub.get_scalar('train/loss').data[0]) == 7


def test_the_oldest_are_dropped(hub):
    hub.log_scalars['train/loss'] = HistoryBuffer([1.0, 2.0], [1, 1], max_length=3)
    log = ScalarLog(hub)
    add(log, 3.0, 4.0)
    assert list(hub.get_scalar('train/loss').data[0]) == [2, 3, 4]


def test_logs_of_many_runs_share_a_hub(hub):
    logs = [ScalarLog(hub) for _ in range(500)]  # as many wrappers in one process
    for log in (*logs, logs[0]):
        add(log, 1.0)
    assert len(hub.get_scalar('train/loss').data[0]) == 501
