"""Tensors as 8-bit or 4-bit integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from man_mm.core.quantization import Noise, chunk_size, dequantize, quantize

CPU = torch.device('cpu')


def noise(seed=0):
    return Noise(CPU, seed)


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 1000),
    st.sampled_from([8, 4]),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_no_value_is_off_by_more_than_a_step(count, bits, mean, scale):
    values = normal(count, seed=count) * scale + mean
    again = dequantize(quantize(values, bits, noise(count)))
    assert again.shape == values.shape and again.dtype == values.dtype
    for group, other in zip(values.split(256), again.split(256), strict=True):
        step = (group.max() - group.min()) / (2**bits - 2)
        rounding = 1e-6 * group.abs().max()  # of float32 itself
        assert (other - group).abs().max() <= 1.02 * step + rounding


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('map_', [torch.Tensor.relu, torch.sigmoid, torch.sin])
def test_the_expectation_is_the_value(bits, map_):
    values = map_(normal(512))
    draws = [dequantize(quantize(values, bits, noise(seed))) for seed in range(400)]
    # Five standard errors of a mean, plus the little by which zeros are kept apart.
    step = values.abs().max() * 2 / (2**bits - 2)
    error = (torch.stack(draws).mean(0) - values).abs().max()
    assert error < step * (5 * 0.5 / 400**0.5 + 2**-9)
    without = [dequantize(quantize(values, bits, Fixed())) for _ in range(2)]
    assert (without[0] - values).abs().max() > error  # rounded down, always


class Fixed:
    """What rounds down."""

    def take(self, count):
        return torch.ones(count)


@pytest.mark.parametrize('bits', [8, 4])
def test_what_is_zero_stays_zero_and_nothing_else_becomes_zero(bits):
    values = normal(10_000).relu() * torch.logspace(-6, 3, 10_000)
    again = dequantize(quantize(values, bits, noise()))
    assert torch.equal(again > 0, values > 0) and not (again < 0).any()


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('value', [0.0, 3.0, -3.0, 1e-42, 1e30])
def test_groups_of_one_value(bits, value):
    values = torch.full((300,), value)
    again = dequantize(quantize(values, bits, noise()))
    torch.testing.assert_close(again, values, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_group_only(value):
    values = normal(768)
    values[300] = value
    again = dequantize(quantize(values, 8, noise()))
    assert not again[300].isfinite()
    assert again[:256].isfinite().all() and again[512:].isfinite().all()


@pytest.mark.parametrize(
    ('bits', 'dtype', 'ratio'),
    [
        (8, torch.float32, 0.256),
        (4, torch.float32, 0.131),
        (8, torch.bfloat16, 0.512),
        (4, torch.float16, 0.262),
    ],
)
def test_bytes(bits, dtype, ratio):
    values = normal(256 * 100).to(dtype)
    codes = quantize(values, bits, noise())
    assert codes.nbytes / values.nbytes == pytest.approx(ratio, abs=5e-4)
    assert dequantize(codes).dtype == dtype


def test_chunks_do_not_show():
    count = 2 * chunk_size(CPU) + 100
    values = torch.linspace(-1, 2, count)
    again = dequantize(quantize(values, 8, noise()))
    assert (again - values).abs().max() < 2.1 / 254
    assert not torch.equal(again, values)


def test_the_same_seed_rounds_alike():
    values = normal(1000)
    same, twice, other = (quantize(values, 8, noise(seed)).codes for seed in (1, 1, 2))
    assert torch.equal(same, twice) and not torch.equal(same, other)
