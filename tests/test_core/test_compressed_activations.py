"""Activations that are saved in few bits."""

import gc
import weakref
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from networks import LABELS, PooledHead, build_model, model_loss
from torch import nn

from man_mm.core import (
    CompressedActivations,
    ExactSteps,
    LocalLearner,
    Unit,
    compressed_activations,
    split,
)
from man_mm.core.compressed_activations import uncompressed
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(compressed_activations, '_SMALLEST', 1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(channels=16):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)]
    layers += [nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)]
    return nn.Sequential(*layers, nn.GELU(), nn.Conv2d(channels, 2, 1))


def gradients(model, x, bits=None, seed=0):
    """Of weights and input, as one vector."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    if bits is None:
        loss = model(x).square().mean()
    else:
        with CompressedActivations(bits).saving():
            loss = model(x).square().mean()
    grads = torch.autograd.grad(loss, [*model.parameters(), x])
    return torch.cat([grad.flatten() for grad in grads])


def error(grads, plain):
    return float((grads - plain).norm() / plain.norm())


def test_gradients_are_those_of_full_precision_plus_noise():
    model, x = network(), normal(2, 3, 24, 24)
    plain = gradients(model, x)
    single = {bits: gradients(model, x, bits) for bits in (8, 4)}
    assert 0 < 5 * error(single[8], plain) < error(single[4], plain) < 0.05
    mean = torch.stack([gradients(model, x, 4, seed) for seed in range(64)]).mean(0)
    assert error(mean, plain) < error(single[4], plain) / 5


def test_the_same_state_of_torch_gives_the_same_noise():
    model, x = network(), normal(2, 3, 8, 8)
    same, twice, other = (gradients(model, x, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(same, twice) and not torch.equal(same, other)


@pytest.mark.parametrize('bits', [8, 4])
def test_relus_pass_on_the_same_gradients(bits):
    x, grad = normal(40, 50), normal(40, 50, seed=1)
    x.requires_grad_()
    plain = torch.autograd.grad(x.relu(), x, grad)[0]
    with CompressedActivations(bits).saving():
        out = x.relu()
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], plain)
    with CompressedActivations(bits).saving():
        out = (x * 1).square()  # its gradient has the noise
    assert not torch.equal(torch.autograd.grad(out, x, grad)[0], 2 * x * grad)


def test_a_storage_is_compressed_once():
    x = normal(64, 256).requires_grad_()
    weight = nn.Parameter(normal(256, 8))
    compressed = CompressedActivations(8)

    def run():
        with compressed.saving():
            y = (x * 1).relu()  # saved by the ReLU and, as views, by both products
            run.out = (y @ weight).sum() + (y.view(32, 512).T @ normal(32, 2)).sum()

    run()  # makes the table of random numbers
    assert measure_memory(run).end < 1.1 * (x.nbytes / 4 + weight.nbytes)


def test_views_and_what_is_overwritten():
    x = normal(6, 8, 10).requires_grad_()

    def run(context):
        with context:
            y = x * 1
            first = y.transpose(0, 2)[2:, 1:].square().sum()
            y = y.detach().mul_(3)  # the same storage, another version
            second = (y * x).sum()
        return torch.autograd.grad(first + second, x)[0]

    with pytest.raises(RuntimeError, match='inplace operation'):
        run(uncompressed())
    values = x.detach()
    expected = 3 * values
    expected[:, 1:, 2:] += 2 * values[:, 1:, 2:]
    found = run(CompressedActivations(8).saving())
    assert error(found, expected) < 0.02


def test_storages_at_the_same_address_are_told_apart():
    weight = nn.Parameter(torch.ones(300))
    with CompressedActivations(8).saving():
        losses = [(torch.full((300,), float(i)) * weight).sum() for i in range(50)]
    (grad,) = torch.autograd.grad(sum(losses), weight)
    torch.testing.assert_close(grad, torch.full((300,), 1225.0), rtol=0.01, atol=0)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_weights_stay_as_they_are_in_mixed_precision_too(dtype, monkeypatch):
    layer, x = nn.Linear(64, 32, bias=False), normal(128, 64).requires_grad_()

    def run(context):
        with context, torch.autocast('cpu', dtype, enabled=dtype is not None):
            out = layer(x * 1)
        return torch.autograd.grad(out.float().sum(), [x, layer.weight])

    plain = run(uncompressed())
    found = run(CompressedActivations(8).saving())
    assert torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])
    monkeypatch.setattr(compressed_activations, '_is_weight', lambda _: False)
    monkeypatch.setattr(compressed_activations._Shared, 'alive', lambda _: None)
    unknown = run(CompressedActivations(8).saving())
    assert not torch.equal(unknown[0], plain[0])


def test_what_is_exempt():
    model, x = network(), normal(2, 3, 8, 8)

    def run(exempt):
        torch.manual_seed(0)
        with CompressedActivations(8).saving():
            if exempt:
                with uncompressed():
                    loss = model(x).square().mean()
            else:
                loss = model(x).square().mean()
        return torch.autograd.grad(loss, model[0].weight)[0]

    plain = torch.autograd.grad(model(x).square().mean(), model[0].weight)[0]
    assert torch.equal(run(True), plain) and not torch.equal(run(False), plain)


@pytest.mark.parametrize('change', [False, True])
def test_what_is_still_there_is_read_instead(change):
    x = normal(8, 64).requires_grad_()
    with CompressedActivations(8).saving():
        y = x * 2
        loss = (y.view(64, 8) ** 2).sum()
    if change:
        y.detach().zero_()  # the codes are of what it was
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, 8 * x) != change and error(grad, 8 * x) < 0.02


@pytest.mark.parametrize('is_kept', [False, True])
def test_codes_of_what_is_still_there_are_freed(is_kept):
    x = normal(8, 1024).requires_grad_()

    def bytes_before_backward(drops):
        kept = []

        def forward():
            compressed = CompressedActivations(8)
            with compressed.saving():
                y = x * 2
                kept.append((y**2).sum())
                if is_kept:
                    kept.append(y)
                del y
                if drops:
                    compressed.drop_needless_codes()

        end = measure_memory(forward).end
        (grad,) = torch.autograd.grad(kept[0], x)
        assert torch.equal(grad, 8 * x) == is_kept
        return end

    freed = bytes_before_backward(drops=False) - bytes_before_backward(drops=True)
    assert freed > x.numel() if is_kept else freed == 0


def test_nothing_outlives_the_loss():
    model, x = network(), normal(2, 3, 16, 16)
    compressed = CompressedActivations(8)
    gc.disable()
    try:
        with compressed.saving():
            y = model(x)
            storage = weakref.ref(y.untyped_storage())
            loss = y.square().mean()
        del y
        loss.backward()
        del loss
        assert storage() is None and compressed._latest is None
    finally:
        gc.enable()


def learner(model, bits=None, **kwargs):
    units = [Unit(f'stage{i}') for i in (1, 2, 3)]
    modules = split(model, units, ['stage1', 'stage2'])
    torch.manual_seed(1)
    compressed = None if bits is None else CompressedActivations(bits)
    heads = [PooledHead() for _ in range(2)]
    return LocalLearner(model, modules, heads, compressed=compressed, **kwargs)


def local(learner, seed=2):
    torch.manual_seed(seed)
    with learner.step(LABELS):
        loss = model_loss(learner.model)
    loss.backward()


def exact(learner, seed=2, weight=0.0):
    steps = ExactSteps(learner, weight)
    torch.manual_seed(seed)
    with steps.step(LABELS):
        loss = model_loss(learner.model)
    loss.backward()
    steps.replay()


def joint(learner, seed=2):
    exact(learner, seed, weight=0.5)


@pytest.mark.parametrize('step', [local, exact, joint])
@pytest.mark.parametrize('options', [{}, dict(micro_batch_size=2)])
def test_local_exact_and_joint_steps(step, options):
    def run(bits, seed=2):
        model = build_model(3).eval()
        step(learner(model, bits, **options), seed)
        return torch.cat([param.grad.flatten() for param in model.parameters()])

    plain = run(None)
    # Rounding is random, and now and then another value is the largest of a pool.
    errors = {
        bits: median(float(error(run(bits, seed), plain)) for seed in range(5))
        for bits in (8, 4)
    }
    assert 0 < 3 * errors[8] < errors[4] < 0.5


def test_freed_heads_are_not_held():
    built = learner(build_model(3), 8)
    local(built)
    heads = weakref.ref(built.heads[0])
    built.free_heads()
    gc.collect()
    assert heads() is None


def test_dropout_scales_what_is_left_and_zeros_stay():
    x = normal(8, 1024).requires_grad_()
    weight = nn.Parameter(normal(1024, 4))
    torch.manual_seed(0)
    with CompressedActivations(8).saving():
        out = F.dropout(x.abs(), 0.5) @ weight
    grad = torch.autograd.grad(out.sum(), weight)[0]
    torch.manual_seed(0)
    torch.randint(2**31, ())
    plain = F.dropout(x.abs(), 0.5) @ weight
    expected = torch.autograd.grad(plain.sum(), weight)[0]
    assert error(grad, expected) < 0.01
