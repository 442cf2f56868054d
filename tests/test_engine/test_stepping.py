"""Steps that are undone where gradients are not finite, without reading a flag."""

import copy

import pytest
import torch
from networks import equal
from torch import nn

from man_mm.engine import stepping
from man_mm.engine.optimizers import ELEMENTWISE
from man_mm.engine.stepping import Stepper


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
def test_a_step_is_that_of_the_optimizer_or_none(kind, chunk, monkeypatch):
    monkeypatch.setattr(stepping, '_CHUNK_BYTES', chunk)
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


@pytest.mark.parametrize('options', [{}, dict(momentum=0.9)])
def test_only_the_first_step_reads_its_flag(options, monkeypatch):
    layers, optimizer = build(torch.optim.SGD, **options)
    stepper, reads = Stepper(optimizer), []
    read = torch.Tensor.__bool__

    def spy(tensor):
        reads.append(tensor)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, '__bool__', spy)
    for seed in range(3):
        step_if(stepper, layers, seed, True)
    assert len(reads) == 1


@pytest.mark.parametrize('flag', [True, False])
def test_state_on_another_device_is_given_back_when_flags_are_read(flag):
    """As Adam's counts of steps are, which stay on the CPU beside a GPU."""
    stepper = Stepper(build(torch.optim.Adam)[1])
    count = torch.tensor(2.0)
    stepper.flag('module1', torch.tensor(flag))
    stepper._elsewhere.append(('module1', count, torch.tensor(1.0)))
    assert stepper.read() == {'module1': flag}
    assert count == (2 if flag else 1)
