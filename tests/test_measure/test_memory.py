import copy
import gc

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from man_mm.core.storages import tensor_bytes
from man_mm.measure import memory
from man_mm.measure.memory import measure_memory

KB = 4000  # bytes of torch.empty(1000)


def measured(fn, **kwargs):
    report = measure_memory(fn, **kwargs)
    return report.peak, report.end


def profiled_peak(fn):
    """Peak of the running sum of the allocations that the profiler sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    events = [e for e in events if e.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def make_step(model, x, forward=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        out = forward(x) if forward else model(x)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # fills the momentum and oneDNN's caches
        step()
    return step


def conv_net():
    model = nn.Sequential(
        *[nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
        *[nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)],
    )
    return make_step(model, torch.randn(8, 3, 32, 32))


def resnet18():
    return make_step(torchvision.models.resnet18(), torch.randn(1, 3, 128, 128))


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return make_step(layer, torch.randn(4, 32, 64))


def checkpointed(use_reentrant):
    def forward(x):
        for block in blocks:
            x = x + checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    layers = [[nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)] for _ in range(3)]
    blocks = nn.ModuleList(nn.Sequential(*block) for block in layers)
    x = torch.randn(512, 256, requires_grad=True)
    step = make_step(blocks, x, forward)
    x.grad = None
    return lambda: (step(), setattr(x, 'grad', None))


def branches():
    """Gradients of three branches meet when little else is alive."""
    x = torch.randn(100000, requires_grad=True)

    def step():
        y = x * 2
        loss = (y * 3).sum() + (y * 4).sum() + (y * 5).sum()
        del y
        loss.backward()
        x.grad = None

    return step


CASES = {
    'conv': (conv_net, 0.02),
    'resnet18': (resnet18, 0.02),
    'encoder': (encoder, 0.001),
    'reentrant': (lambda: checkpointed(True), 0.02),
    'non-reentrant': (lambda: checkpointed(False), 0.02),
    'branches': (branches, 0.001),
}


@pytest.mark.parametrize('name', CASES)
def test_agrees_with_the_profiler(name, monkeypatch):
    make, tolerance = CASES[name]
    step = make()
    report = measure_memory(step)
    assert report.peak == pytest.approx(profiled_peak(step), rel=tolerance)
    assert report.end == 0
    assert measure_memory(step) == report
    # Controls: other bytes when nothing is released or a sum is not recognized.
    if name == 'branches':
        monkeypatch.setattr(memory, '_engine_sums', lambda func: False)
    else:
        release = 'man_mm.measure.memory.StorageTracker._release'
        monkeypatch.setattr(release, lambda *args: None)
    wrong = measure_memory(step).peak
    assert wrong != pytest.approx(profiled_peak(step), rel=0.02)


@pytest.mark.parametrize(('free', 'peak', 'end'), [(True, 2, 0), (False, 3, 0)])
def test_a_freed_tensor_does_not_count(free, peak, end):
    def fn():
        x = torch.empty(1000)
        y = x + 1
        if free:
            del x
        return y * 2

    assert measured(fn) == (peak * KB, end * KB)


@pytest.mark.parametrize(('keep', 'end'), [(True, 1), (False, 0)])
def test_a_leaked_tensor_is_in_end(keep, end):
    leaked = []

    def fn():
        x = torch.empty(1000)
        if keep:
            leaked.append(x[5])  # a view keeps the whole storage

    assert measured(fn) == (KB, end * KB)


@pytest.mark.parametrize(
    ('op', 'peak'),
    [
        (lambda x: x.view(10, 100).t()[3:].detach(), 1),
        (lambda x: x.add_(1).relu_().zero_(), 1),
        (lambda x: x.expand(7, 1000), 1),
        (lambda x: x.expand(7, 1000).contiguous(), 8),
        (lambda x: x.add(1), 2),
        (lambda x: torch.no_grad()(torch.add)(x, 1), 2),
        (lambda x: torch.add(x, 1, out=torch.empty(0)), 2),
        (lambda x: x.resize_(3000), 3),
        (lambda x: (x.untyped_storage().resize_(2 * KB), x.add(1)), 3),
        (lambda x: x.split(100), 1),
        (lambda x: torch._foreach_add([x, x], 1), 3),
        (lambda x: torch.empty(1000, device='meta'), 1),
    ],
)
def test_views_and_in_place_ops_are_free(op, peak):
    assert measured(lambda: op(torch.empty(1000))) == (peak * KB, 0)


def test_what_existed_before_counts_nothing():
    x, small = torch.empty(1000), torch.empty(10)
    tensors = {'x': torch.empty(1000)}
    assert measured(lambda: x.add_(1).view(10, 100)) == (0, 0)
    assert measured(lambda: tensors.pop('x').mul_(2)) == (0, 0)
    assert measured(lambda: torch.empty(0).set_(x.untyped_storage())) == (0, 0)
    assert measured(lambda: x + 1) == (KB, 0)
    # Only the growth of a storage counts, and it stays.
    assert measured(lambda: small.resize_(1000)) == (KB - 40, KB - 40)
    assert measured(lambda: small.resize_(1000)) == (0, 0)


@pytest.mark.parametrize(
    ('make', 'size'),
    [
        (lambda: torch.tensor([1.0, 2.0, 3.0]), 12),
        (lambda: torch.from_numpy(np.ones(1000, np.float32)), KB),
        (lambda: torch.empty(0).new_full((1000,), 3.0), KB),
        (lambda: torch.zeros(1000).double(), 3 * KB),
        (lambda: torch.randperm(1000), 2 * KB),
        (lambda: nn.Linear(10, 9), 4 * 99),
        (lambda: None, 0),
    ],
)
def test_factories_count(make, size):
    assert measured(make) == (size, 0)


@pytest.mark.parametrize(('grad', 'end'), [(True, KB + 4), (False, 4)])
def test_a_variable_saved_for_backward_stays(grad, end):
    x, kept = torch.zeros(1000, requires_grad=True), []

    def fn():
        with torch.set_grad_enabled(grad):
            kept.append(x.exp().sum())  # only the graph keeps the result of exp

    assert measured(fn) == (KB + 4, end)


def test_backward_in_functions_and_hooks_counts():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            scratch = torch.empty(50000) + 1 if big else None
            (x,) = ctx.saved_tensors
            del scratch
            return 2 * x * grad

    def local_backward(module, args, out):
        Square.apply(out).sum().backward()
        return out.detach()

    layer = nn.Linear(10, 10, bias=False)
    layer.register_forward_hook(local_backward)
    x = torch.randn(5, 10)
    big = False
    small = measure_memory(lambda: layer(x))
    assert small.end == 400  # the gradient
    layer.weight.grad, big = None, True
    # Twice the scratch, the output (it is saved too), the loss and its gradient.
    assert measured(lambda: layer(x)) == (400000 + 200 + 4 + 4, 400)
    assert small.peak < 2000


def test_gradient_sums():
    x = torch.zeros(1000, requires_grad=True)

    def fn():
        parts = x * 3, x * 4
        for i in range(2 if keep else 0):
            parts[i].grad_fn.register_hook(lambda grads, _: kept.append(grads))
        loss = parts[0].sum() + parts[1].sum()
        del parts
        kept.extend(torch.autograd.grad(loss, x))

    peaks = {}
    for keep, end in [(True, 3 * KB), (False, KB)]:
        kept = []
        peaks[keep], after = measured(fn)
        assert after == end
    # Kept gradients cannot be added up in place.
    assert peaks[True] >= 3 * KB > peaks[False] >= 2 * KB


def test_recomputation_during_backward_counts():
    def unpack(x):
        with torch.enable_grad():
            torch.empty(50000) + 1
        return x

    def fn(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            loss = x.square().sum()
        torch.autograd.grad(loss, x)

    x = torch.zeros(10, requires_grad=True)
    assert measure_memory(lambda: fn(unpack)).peak >= 400000
    assert measure_memory(lambda: fn(lambda x: x)).peak < 400


@pytest.mark.parametrize('foreach', [True, False])
@pytest.mark.parametrize(('momentum', 'kept'), [(0.9, 2), (0, 1)])
def test_optimizer_state_counts(foreach, momentum, kept):
    layer = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(
        layer.parameters(), 0.1, momentum=momentum, foreach=foreach
    )

    def fn():
        layer(torch.ones(1, 30)).sum().backward()
        optimizer.step()

    report = measure_memory(fn)
    assert report.end == kept * tensor_bytes(layer)
    assert report.end == tensor_bytes([p.grad for p in layer.parameters()]) + (
        tensor_bytes(optimizer)
    )


def test_cycles_are_the_same_every_time():
    def fn(collect):
        for _ in range(3000):
            cycle = [torch.empty(1000)]
            cycle.append(cycle)
        if collect:
            gc.collect()

    assert measured(lambda: fn(False)) == (3000 * KB, 3000 * KB)
    assert gc.isenabled()
    # The last one still has a name when the others are collected.
    assert measured(lambda: fn(True)) == (3000 * KB, KB)


@pytest.mark.parametrize('error', [ValueError, NotImplementedError])
def test_errors_propagate_and_end_the_measurement(error):
    def fn():
        x = torch.empty(1000)
        assert _get_current_dispatch_mode() is not None
        if error is ValueError:
            raise ValueError(x.shape)
        x.to_sparse()

    with pytest.raises(error):
        measure_memory(fn)
    assert _get_current_dispatch_mode() is None
    assert gc.isenabled()
    assert measured(lambda: torch.empty(1000)) == (KB, 0)


def test_only_the_device_counts():
    def fn():
        return torch.empty(1000), torch.empty(500, device='meta')

    assert measured(fn) == (KB, 0)
    assert measured(fn, device='meta') == (KB // 2, 0)


def test_tensor_bytes():
    x = torch.empty(1000)
    linear = nn.Linear(10, 9)
    norm = nn.BatchNorm1d(5)
    assert tensor_bytes(x) == tensor_bytes(x[3:5]) == KB
    assert tensor_bytes([x, {'a': (x.view(10, 100), None)}, {x}]) == KB
    assert tensor_bytes([x, x.clone()]) == 2 * KB
    assert tensor_bytes(linear) == tensor_bytes([linear, linear.weight]) == 4 * 99
    assert tensor_bytes([linear, copy.deepcopy(linear)]) == 2 * 4 * 99
    assert tensor_bytes(norm) == 4 * 5 * 4 + 8
    assert tensor_bytes([None, 3, 'text']) == 0
    optimizer = torch.optim.SGD(linear.parameters(), 0.1, momentum=0.9)
    assert tensor_bytes(optimizer) == 0
    linear(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert tensor_bytes(optimizer) == 4 * 99


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda():
    def fn():
        x = torch.empty(1 << 20, device='cuda')
        return x + 1, torch.empty(1000)

    report = measure_memory(fn, device='cuda')
    assert (report.peak, report.end) == (8 << 20, 0)
    assert report.allocated == report.requested == 8 << 20
    assert report.reserved >= 0
    assert measured(fn) == (KB, 0)


def test_watch_is_told_of_every_op_and_of_the_end():
    totals = []

    def fn():
        a = torch.empty(1000)
        b = torch.empty(1000)
        del a
        return b + 1

    report = measure_memory(fn, watch=totals.append)
    assert totals == [KB, 2 * KB, 2 * KB, 0]
    assert report == measure_memory(fn)  # control: watching changes nothing
