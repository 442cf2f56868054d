"""Max pooling that saves a byte a value."""

import pytest
import torch
from torch import nn

from man_mm.core import max_pool
from man_mm.core.max_pool import light_max_pool
from man_mm.core.patches import patched
from man_mm.measure.memory import measure_memory

POOLS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=2, ceil_mode=True),
    dict(kernel_size=(3, 2), stride=(1, 3), padding=(1, 0)),
    dict(kernel_size=(5, 16), stride=1, padding=2),
]


def images(dtype=torch.float32):
    # With few distinct values: many windows have several maxima.
    x = torch.randint(5, (2, 3, 21, 19), generator=torch.Generator().manual_seed(0))
    return x.to(dtype).requires_grad_()


def outputs(pool, x):
    out = pool(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out) % 7
    return out, torch.autograd.grad(out, x, weights)[0]


@pytest.mark.parametrize('options', POOLS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_outputs_and_gradients_are_equal(options, dtype, memory_format):
    pool, x = nn.MaxPool2d(**options), images(dtype)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    plain = outputs(pool, x)
    with patched(pool, light_max_pool(pool)):
        light = outputs(pool, x)
    assert all(map(torch.equal, plain, light)) and light[1].any()


def test_other_maxima_are_found_out(monkeypatch):
    pool, x = nn.MaxPool2d(3, stride=2, padding=1), images()
    corners = max_pool._corners
    plain = outputs(pool, x)
    with patched(pool, light_max_pool(pool)):
        out = pool(x)
        monkeypatch.setattr(max_pool, '_corners', lambda *args: (corners(*args)[0], 0))
        weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out) % 7
        grad = torch.autograd.grad(out, x, weights)[0]
    assert torch.equal(out, plain[0]) and not torch.equal(grad, plain[1])


def test_neither_input_nor_64_bit_integers_are_saved():
    pool, x = nn.MaxPool2d(2), images()

    def end(wrap):
        def run():
            run.out = wrap(pool.forward)(x * 1)

        return measure_memory(run).end - run.out.nbytes

    count = pool(x).numel()
    assert end(light_max_pool(pool)) == count
    assert end(lambda forward: forward) == 8 * count + x.nbytes


@pytest.mark.parametrize(
    'options', [dict(return_indices=True), dict(dilation=2), dict(kernel_size=17)]
)
def test_what_is_left_alone(options):
    assert light_max_pool(nn.MaxPool2d(**{'kernel_size': 2, **options})) is None
