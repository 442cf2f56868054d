"""mmdet's elementwise losses under their patches, against themselves."""

from contextlib import ExitStack

import pytest
import torch
from mmdet.models import losses as mmdet_losses
from reads import count_reads

from man_mm.core.patches import patched
from man_mm.core.sliced_losses import sliced_sum
from man_mm.engine import loss_patches
from man_mm.engine.loss_patches import ELEMENTWISE_LOSSES
from man_mm.engine.unread_losses import unread
from man_mm.measure.memory import measure_memory

ROWS, CLASSES = 60, 4


def case(name, rows=ROWS):
    """Predictions, target and weight as heads of mmdet give them to a loss."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    pred = torch.randn(rows, CLASSES, generator=generator) * 2
    labels = torch.randint(CLASSES + 1, (rows,), generator=generator)
    soft = rand(rows, CLASSES) * (rand(rows, CLASSES) < 0.2)
    if name == 'FocalLoss':
        return pred, labels, rand(rows)
    if name == 'FocalLoss, one-hot':
        return pred, (soft > 0).long(), rand(rows, CLASSES)
    if name == 'QualityFocalLoss':
        return pred, (labels, rand(rows)), rand(rows)
    if name == 'QualityFocalLoss, tensor':
        return pred, soft, rand(rows)
    if name == 'VarifocalLoss':
        return pred, soft, rand(rows, CLASSES)
    if name == 'DistributionFocalLoss':
        return pred, rand(rows) * (CLASSES - 1.01), rand(rows)
    heat = rand(rows, 2, 3, 3)
    return rand(rows, 2, 3, 3).clamp(0.01, 0.99), heat, None


CASES = [*ELEMENTWISE_LOSSES, 'FocalLoss, one-hot', 'QualityFocalLoss, tensor']
CALLS = [
    dict(avg_factor=7.0),
    dict(avg_factor=torch.tensor(7.0)),
    dict(),
    dict(reduction_override='sum'),
    dict(reduction_override='none'),
]


def double(value):
    if isinstance(value, tuple):
        return tuple(map(double, value))
    is_float = value is not None and value.is_floating_point()
    return value.double() if is_float else value


def result(loss, name, is_patched, **kwargs):
    pred, target, weight = case(name)
    pred.requires_grad_()
    with ExitStack() as stack:
        if is_patched:
            ((submodule, wrap),) = loss_patches.loss_patches(loss)
            stack.enter_context(patched(submodule, wrap))
        out = loss(pred, target, weight=weight, **kwargs)
    (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum().backward()
    return out.detach(), pred.grad


@pytest.fixture
def sliced(monkeypatch):
    """Slices are small, and the calls that are sliced are listed."""
    calls = []

    def listed(*args):
        calls.append(args)
        return sliced_sum(*args)

    monkeypatch.setattr(loss_patches, '_SLICE', {'cpu': 64})
    monkeypatch.setattr(loss_patches, 'sliced_sum', listed)
    return calls


def build(name, **kwargs):
    return getattr(mmdet_losses, name.partition(',')[0])(loss_weight=1.5, **kwargs)


@pytest.mark.parametrize('kwargs', CALLS, ids=str)
@pytest.mark.parametrize('name', CASES)
def test_losses_equal_themselves(name, kwargs, sliced):
    loss = build(name)
    plain, other = (result(loss, name, is_, **kwargs) for is_ in (False, True))
    torch.testing.assert_close(other[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(other[1], plain[1], rtol=1e-6, atol=1e-9)
    assert bool(sliced) == (kwargs.get('reduction_override') != 'none')


def test_a_loss_with_another_gamma_is_found(sliced):
    plain = result(build('FocalLoss'), 'FocalLoss', False)
    other = result(build('FocalLoss', gamma=1.9), 'FocalLoss', True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other[1], plain[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', CASES)
def test_gradcheck(name, sliced):
    loss = build(name)
    pred, target, weight = map(double, case(name, 20))
    ((submodule, wrap),) = loss_patches.loss_patches(loss)
    with patched(submodule, wrap):
        assert torch.autograd.gradcheck(
            lambda x: loss(x, target, weight=weight, avg_factor=3.0),
            pred.requires_grad_(),
        )
    assert sliced


def test_targets_with_a_gradient_and_small_losses_run_as_a_whole(sliced):
    loss = build('VarifocalLoss')
    pred, target, _ = case('VarifocalLoss')
    ((submodule, wrap),) = loss_patches.loss_patches(loss)
    with patched(submodule, wrap):
        target.requires_grad_()
        loss(pred.requires_grad_(), target).backward()
        assert target.grad.any() and not sliced
        loss(pred[:4], target[:4].detach())
        loss(pred[:0], target[:0].detach())
    assert not sliced


@pytest.mark.parametrize('is_sliced', [True, False])
@pytest.mark.parametrize('name', CASES)
def test_no_value_is_read(name, is_sliced, monkeypatch):
    monkeypatch.setattr(loss_patches, '_SLICE', {'cpu': 64 if is_sliced else 2**17})
    loss = build(name)
    with count_reads() as reads:
        result(loss, name, True, avg_factor=7.0)
    assert not reads
    with count_reads() as reads:
        result(loss, name, False, avg_factor=7.0)
    reading = ('FocalLoss', 'QualityFocalLoss', 'QualityFocalLoss, tensor')
    assert bool(reads) == (name in reading)  # control


@pytest.mark.parametrize(
    'name, option', [('FocalLoss', 'gamma'), ('QualityFocalLoss', 'beta')]
)
def test_what_is_not_read_changes_no_bit(name, option):
    plain, other, changed = (
        result(build(name, **options), name, is_patched, avg_factor=7.0)
        for options, is_patched in (({}, False), ({}, True), ({option: 1.9}, True))
    )
    assert all(map(torch.equal, plain, other))
    assert not any(map(torch.equal, plain, changed))  # control


def test_activated_losses_stay_as_they_are():
    loss = build('QualityFocalLoss', activated=True)
    assert unread(loss, loss.forward) == loss.forward


def test_a_patch_does_not_outlive_the_step(sliced):
    loss = build('FocalLoss')
    result(loss, 'FocalLoss', True)
    assert 'forward' not in vars(loss) and len(sliced) == 1
    result(loss, 'FocalLoss', False)
    assert len(sliced) == 1


def test_the_peak_of_a_focal_loss():
    loss = build('FocalLoss')
    logits = torch.randn(2**14, 80).requires_grad_()
    labels = torch.randint(81, (2**14,))

    def peak(is_patched):
        def step():
            with ExitStack() as stack:
                if is_patched:
                    ((submodule, wrap),) = loss_patches.loss_patches(loss)
                    stack.enter_context(patched(submodule, wrap))
                loss(logits * 1, labels).backward()
            logits.grad = None

        return measure_memory(step).peak / logits.nbytes

    assert peak(True) < 4.5 < 9 < peak(False)
