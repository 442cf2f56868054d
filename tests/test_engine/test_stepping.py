"""Steps that are undone where gradients are not finite, without reading a flag."""

import copy

import pytest
import torch
from networks import equal
from torch import nn

from man_mm.engine import optimizers, stepping
from man_mm.engine.optimizers import ELEMENTWISE
from man_mm.engine.stepping import Stepper
from man_mm.measure import measure_memory


@pytest.fixture(params=[True, False], ids=['gpu', 'cpu'])
def waits(request, monkeypatch):
    """Whether to read a flag makes the host wait."""
    monkeypatch.setattr(stepping, 'waits_for', lambda flag: request.param)
    return request.param


def build(kind, **options):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    layers.to(memory_format=torch.channels_last)
    return layers, kind(layers.parameters(), lr=0.1, **options)


def add_grads(layers, seed):
    torch.manual_seed(seed)
    for param in layers.parameters():
        param.grad = torch.randn_like(param)


def everything(layers, optimizer):
    return copy.deepcopy([list(layers.parameters()), optimizer.state_dict()])


def step_if(stepper, layers, seed, flag):
    add_grads(layers, seed)
    stepper.flag('module1', torch.tensor(flag))
    stepper.step_if_finite('module1', list(layers.parameters()))
    assert all(param.grad is None for param in layers.parameters())
    assert stepper.read() == {'module1': flag}


@pytest.mark.parametrize('chunk', [2**24, 100])
@pytest.mark.parametrize('kind', ELEMENTWISE)
def test_a_step_is_that_of_the_optimizer_or_none(kind, chunk, waits, monkeypatch):
    monkeypatch.setattr(stepping, '_CHUNK_BYTES', chunk)
    monkeypatch.setattr(stepping, '_LEAST_BYTES', chunk)
    layers, optimizer = build(kind)
    plain, control = build(kind)
    stepper = Stepper(optimizer)
    for seed, flag in enumerate([False, True, True, False, True]):
        before = everything(layers, optimizer)
        step_if(stepper, layers, seed, flag)
        if flag:
            add_grads(plain, seed)
            control.step()
        else:
            assert equal(everything(layers, optimizer), before)
        assert equal(everything(layers, optimizer), everything(plain, control))


@pytest.mark.parametrize('nbytes', [64, 500])
@pytest.mark.parametrize('kind', ELEMENTWISE)
def test_large_parameters_are_stepped_in_parts(kind, nbytes, waits, monkeypatch):
    parts = spy_on_parts(monkeypatch, nbytes)
    test_a_step_is_that_of_the_optimizer_or_none(kind, 2**24, waits, monkeypatch)
    # A row of the first convolution has 108 bytes, of the second 32.
    rows = [4, 4] if nbytes == 500 else [*(8 * [1]), 2, 2]
    assert [len(part) for part in parts[: len(rows)]] == rows


def test_a_part_that_keeps_no_state_would_differ(waits, monkeypatch):
    monkeypatch.setattr(optimizers, '_is_split_like', lambda value, param: False)
    spy_on_parts(monkeypatch, 500)
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_step_is_that_of_the_optimizer_or_none(
            torch.optim.Adam, 2**24, waits, monkeypatch
        )


def spy_on_parts(monkeypatch, nbytes):
    parts = []

    def spy(optimizer, param, nbytes):
        for part in optimizers.in_parts(optimizer, param, nbytes):
            parts.append(part)
            yield part

    monkeypatch.setattr(stepping, '_PART_BYTES', nbytes)
    monkeypatch.setattr(stepping, 'in_parts', spy)
    return parts


@pytest.mark.parametrize('weight_decay', [0, 0.1])
def test_bytes_for_a_moment_are_those_of_a_part(weight_decay, waits, monkeypatch):
    layer = nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay
    )
    stepper = Stepper(optimizer)

    def peak():
        add_grads(layer, 0)
        stepper.flag('module1', torch.tensor(True))
        params = list(layer.parameters())
        report = measure_memory(lambda: stepper.step_if_finite('module1', params))
        stepper.read()
        return report.peak

    nbytes = layer.weight.nbytes
    monkeypatch.setattr(stepping, '_PART_BYTES', nbytes)
    peak()  # makes the momentum
    if waits:
        assert peak() >= 2 * nbytes  # to undo weights and momentum
    monkeypatch.setattr(stepping, '_PART_BYTES', nbytes // 10)
    assert peak() <= 0.3 * nbytes


@pytest.mark.parametrize('options', [{}, dict(momentum=0.9)])
def test_only_the_first_step_reads_its_flag_if_that_waits(options, waits, monkeypatch):
    layers, optimizer = build(torch.optim.SGD, **options)
    stepper, reads = Stepper(optimizer), []
    read = torch.Tensor.__bool__

    def spy(tensor):
        reads.append(tensor)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, '__bool__', spy)
    for seed in range(3):
        step_if(stepper, layers, seed, True)
    assert len(reads) == (1 if waits else 3)


@pytest.mark.parametrize('flag', [True, False])
def test_state_on_another_device_is_given_back_when_flags_are_read(flag):
    """As Adam's counts of steps are, which stay on the CPU beside a GPU."""
    stepper = Stepper(build(torch.optim.Adam)[1])
    count = torch.tensor(2.0)
    stepper.flag('module1', torch.tensor(flag))
    stepper._elsewhere.append(('module1', count, torch.tensor(1.0)))
    assert stepper.read() == {'module1': flag}
    assert count == (2 if flag else 1)


def test_a_module_is_stepped_in_one_call_where_nothing_waits(waits, monkeypatch):
    monkeypatch.setattr(stepping, '_LEAST_BYTES', 100)
    layers, optimizer = build(torch.optim.SGD, momentum=0.9)
    stepper, calls, step = Stepper(optimizer), [], optimizer.step
    monkeypatch.setattr(optimizer, 'step', lambda: calls.append(1) or step())
    for seed in range(2):
        calls.clear()
        add_grads(layers, seed)
        stepper.flag('module1', torch.tensor(True))
        stepper.step_module('module1', list(layers.parameters()))
    assert len(calls) > 1 if waits else len(calls) == 1
    stepper.step_module('module2', [])  # nothing to step, and no flag
