"""Losses that run a few rows at a time."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from man_mm.core.sliced_losses import sliced_sum
from man_mm.measure.memory import measure_memory


def focal(pred, target, weight=None):
    """A loss whose gradient has many steps."""
    p = pred.sigmoid()
    loss = bce(pred, target, reduction='none') * ((1 - p) * target + p).square()
    return loss if weight is None else loss * weight[:, None]


def data(rows=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(rows, 5, generator=generator, dtype=dtype).requires_grad_()
    target = (torch.rand(rows, 5, generator=generator) < 0.3).to(dtype)
    return pred, target, torch.rand(rows, generator=generator, dtype=dtype)


@pytest.mark.parametrize('rows', [1, 4, 11, 100])
@pytest.mark.parametrize('weighted', [True, False])
def test_gradients_equal_those_of_the_whole_bit_for_bit(rows, weighted):
    pred, target, weight = data()
    weight = weight if weighted else None
    plain = focal(pred, target, weight).sum()
    sliced = sliced_sum(focal, pred, [target, weight], rows)
    torch.testing.assert_close(sliced, plain)
    grads = [torch.autograd.grad(loss * 3, pred)[0] for loss in (plain, sliced)]
    assert torch.equal(*grads) and grads[0].any()


def test_gradcheck():
    pred, target, weight = data(5)
    assert torch.autograd.gradcheck(
        lambda x: sliced_sum(focal, x, [target, weight], 2), pred
    )


def test_gradcheck_finds_a_loss_that_reads_other_rows():
    pred, target, _ = data(5)

    def coupled(pred, target):
        return focal(pred - pred.detach().mean(), target)

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: sliced_sum(coupled, x, [target], 2), pred)


def test_the_peak_is_that_of_predictions_and_their_gradient():
    pred, target, _ = data(2**14, torch.float32)

    def peak(rows):
        def step():
            # A copy, as of the logits of a head.
            sliced_sum(focal, pred * 1, [target], rows).backward()
            pred.grad = None

        return measure_memory(step).peak / pred.nbytes

    assert peak(2**9) < 3.6 < 7 < peak(2**14)


def test_the_sum_of_half_precision_does_not_stall():
    pred, target = torch.zeros(2**13, 4), torch.ones(2**13, 4)
    pred = pred.bfloat16().requires_grad_()
    loss = sliced_sum(lambda x, y: (x - y).abs(), pred, [target.bfloat16()], 2)
    assert loss.dtype == torch.bfloat16 and loss == 2**15
    loss.backward()
    assert torch.equal(pred.grad, -torch.ones_like(pred))


def test_mixed_precision_in_the_second_run_too():
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    pred, target, _ = data(dtype=torch.float32)

    def product(pred, target):
        return ((pred @ weight).float() - target).square()

    grads = []
    for run in (
        lambda: product(pred, target).sum(),
        lambda: sliced_sum(product, pred, [target], 11),
    ):
        with torch.autocast('cpu', torch.bfloat16):
            loss = run()
        grads.append(torch.autograd.grad(loss, pred)[0])
    assert torch.equal(*grads)
    exact = torch.autograd.grad(product(pred, target).sum(), pred)[0]
    assert not torch.equal(grads[0], exact)  # control
