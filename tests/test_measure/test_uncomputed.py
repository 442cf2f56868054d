"""Steps without values: the bytes and FLOPs of real ones, in no memory and time."""

import resource
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from man_mm.measure import Uncomputed, count_flops, measure_memory
from man_mm.measure import uncomputed as module

torch.set_num_threads(1)


class Network(nn.Module):
    """Views, in-place ops, indices, a mask, and a shape that depends on values."""

    def __init__(self, width=64):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.out = nn.Linear(width, 200, bias=False)

    def forward(self, x, labels):
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu_(), 2)
        x = x.flatten(2).transpose(1, 2)
        x = self.out(x + self.attend(x, x, x)[0])
        chosen = x[(labels == 1).nonzero()[:, 0]]
        best = x.softmax(-1).max(-1).values.topk(7).indices
        return x.square().mean() + chosen.sum() + x.flatten(0, 1)[best[0]].sum()


def step_of():
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.rand(4, 3, 48, 48), torch.tensor([1, 0, 1, 1])

    def step():
        model(images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def timeline():
    """Bytes that are alive after each op of a step."""
    after = []
    measure_memory(step_of(), watch=after.append)
    return after


def test_bytes_and_flops_are_those_of_the_computed_step():
    step = step_of()
    computed, flops = measure_memory(step), count_flops(step)
    with Uncomputed() as mode:
        step = step_of()
        mode.flops = 0
        report = measure_memory(step)
        assert mode.flops == flops
        others = timeline()
    assert report == computed
    assert others == timeline()


@pytest.mark.parametrize('wrong', ['views', 'dtype'])
def test_a_kernel_that_is_told_wrongly_is_found(monkeypatch, wrong):
    run = module._run_on_meta

    def lie(func, args, kwargs):
        out = run(func, args, kwargs)
        if wrong == 'views' and func is torch.ops.aten._unsafe_view.default:
            return torch.empty(args[1], device='meta')
        if wrong == 'dtype' and func.overloadpacket is torch.ops.aten.convolution:
            return out.double()
        return out

    bytes_after_ops = timeline()
    monkeypatch.setattr(module, '_run_on_meta', lie)
    try:
        with Uncomputed():
            others = timeline()
    except RuntimeError:
        return
    assert others != bytes_after_ops


def test_large_steps_take_no_memory_and_no_time():
    used, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    with Uncomputed() as mode:
        layer = nn.Linear(2**16, 2**16, bias=False)  # 16 GiB
        nn.init.normal_(layer.weight)
        x = torch.zeros(2**16, 2**16)
        report = measure_memory(lambda: layer(x).sum().backward())
    assert report.peak == 2**34 + 2 * 4  # a gradient; the loss and its own
    assert mode.flops == 2 * 2 * 2**48
    assert time.time() - start < 5
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    assert used < 2**18  # KiB


def test_what_depends_on_no_random_number_is_computed():
    with Uncomputed():
        points = torch.arange(2**18) * 2.0
        blank = torch.rand(2**18)
        chosen = points[points > 10]
        assert int(points[-1]) == 2 * (2**18 - 1)
        assert len(chosen) == 2**18 - 6
        assert (blank + points)[-1] == 0  # a large one that does
        assert (blank[:9] + 1).sum() == 9  # a small one
    assert torch.rand(2**18).sum() > 0  # outside


@pytest.mark.parametrize('mode', [nullcontext, Uncomputed])
def test_small_networks_keep_their_values(mode):
    with mode():
        x = torch.tensor([[1.0, 2.0]])
        assert (x @ x.T).item() == 5
