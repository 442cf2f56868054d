"""Tensors in files: values, room, parameters that are used twice."""

import copy
import os

import pytest
import torch
from torch import nn

from man_mm.engine.disk_tensors import empty_on_disk, parameters_on_disk


def allocated(monkeypatch):
    """A list of the bytes of all files that are made from now on."""
    sizes, real = [], os.posix_fallocate

    def fallocate(file, start, size):
        sizes.append(size)
        real(file, start, size)

    monkeypatch.setattr(os, 'posix_fallocate', fallocate)
    return sizes


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_is_like_any_other(tmp_path, monkeypatch, dtype):
    sizes = allocated(monkeypatch)
    values = torch.arange(60_000).view(300, 200).to(dtype)
    tensor = empty_on_disk(values, tmp_path).copy_(values)
    assert torch.equal(tensor, values) and tensor.dtype == dtype
    assert sizes == [values.nbytes] and not os.listdir(tmp_path)
    torch.save(tensor, tmp_path / 'tensor.pth')
    assert torch.equal(torch.load(tmp_path / 'tensor.pth'), values)
    empty_on_disk(values[:10], tmp_path)
    assert len(sizes) == 1  # small ones stay in memory


def test_without_room_it_stays_in_memory(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', fail)
    values = torch.rand(300, 200)
    assert torch.equal(empty_on_disk(values, tmp_path).copy_(values), values)
    assert not os.listdir(tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(200, 300), nn.Linear(200, 300)
        self.second.weight = self.first.weight
        scale = nn.Parameter(torch.ones(300, 200), requires_grad=False)
        self.scale = scale
        self.again = scale


def test_parameters_are_drawn_and_shared_as_elsewhere(tmp_path, monkeypatch):
    torch.manual_seed(0)
    plain = Tied()
    sizes = allocated(monkeypatch)
    torch.manual_seed(0)
    with parameters_on_disk(tmp_path):
        model = Tied()
    assert sizes == [240_000] * 3  # two weights and the scale
    for (name, ours), theirs in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad
    assert model.second.weight is model.first.weight and model.again is model.scale
    nn.Linear(200, 300)
    assert len(sizes) == 3  # control: later ones are left alone
    assert torch.equal(copy.deepcopy(model).scale, plain.scale)
