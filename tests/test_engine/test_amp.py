"""Mixed precision: bfloat16 and float16, on the CPU too."""

import copy

import pytest
import torch
from conftest import (
    LOCAL_LEARNING,
    batch_of,
    build_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    labelled_images,
)
from mmengine.optim import build_optim_wrapper

import man_mm
from man_mm.core.entry import Entry
from man_mm.engine.amp import AmpLocalLearningOptimWrapper


def train(model, wrapper, batch, steps=2):
    for _ in range(steps):
        model.train_step(copy.deepcopy(batch), wrapper)
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_one_module_is_plain_training_under_autocast(dtype):
    batch = labelled_images()
    plain, local, single = (build_classifier(18) for _ in range(3))
    whole = dict(partition=dict(type='CutPartition', cuts=[]))
    amp = dict(dtype=str(dtype).removeprefix('torch.'), loss_scale=1024.0)
    trained = train(local, build_wrapper(local, amp=amp, **whole), batch)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    for _ in range(2):
        with torch.autocast('cpu', dtype):
            data = plain.data_preprocessor(copy.deepcopy(batch), training=True)
            loss, _ = plain.parse_losses(plain(**data, mode='loss'))
        (loss.float() * scale).backward()
        for param in plain.parameters():
            param.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
    assert same(trained, plain.parameters())
    control = train(single, build_wrapper(single, **whole), batch)
    assert not same(trained, control)


@pytest.mark.parametrize('update', ['module', 'iteration'])
def test_overflow_skips_its_own_module_only(update, monkeypatch):
    model = build_classifier(18)
    wrapper = build_wrapper(
        model, amp=dict(dtype='float16', loss_scale=dict(init_scale=256.0)),
        update=update,
    )  # fmt: skip
    learner = wrapper.learner
    forward = learner.heads[1].forward

    def too_large(*args):
        return {name: 1e38 * loss for name, loss in forward(*args).items()}

    def moved():
        before = [[p.clone() for p in learner.params(m)] for m in learner.modules]
        model.train_step(labelled_images(), wrapper)
        return [
            not same(old, learner.params(module))
            for old, module in zip(before, learner.modules, strict=True)
        ]

    assert moved() == [True] * 4  # control
    monkeypatch.setattr(learner.heads[1], 'forward', too_large)
    assert moved() == [True, False, True, True]
    assert [scaler.get_scale() for scaler in wrapper.scalers] == [256, 128, 256, 256]
    assert all(p.grad is None for p in learner.params(learner.modules[1]))
    monkeypatch.undo()
    assert moved() == [True] * 4


def front_update(first=256.0, last=256.0, spoil=False):
    """How a step moves EDSR's shallow convolution, at two loss scales."""
    model = build_restorer('edsr')
    sgd = dict(type='SGD', lr=1.0)
    wrapper = build_wrapper(
        model, amp=dict(dtype='float16', loss_scale=256.0), optimizer=sgd
    )
    for scaler, scale in ((wrapper.scalers[0], first), (wrapper.scalers[-1], last)):
        scaler.scale(torch.ones(()))  # or it has none yet
        scaler.update(scale)
    if spoil:
        head = wrapper.learner.heads[0]
        head.register_forward_hook(
            lambda _m, _args, loss: {'loss': 1e38 * loss['loss']}
        )
    before = model.generator.conv_first.weight.detach().clone()
    model.train_step(image_pairs(), wrapper)
    return model.generator.conv_first.weight.detach() - before


def test_gradients_in_front_of_the_first_unit_have_one_scale(monkeypatch):
    expected = front_update()

    def error(**scales):
        return (front_update(**scales) - expected).norm() / expected.norm()

    assert error(first=16.0) < 0.02
    assert error(last=16.0) < 0.02
    monkeypatch.setattr(AmpLocalLearningOptimWrapper, '_rescale', lambda self, g: g)
    assert error(first=16.0) > 0.1 and error(last=16.0) > 1  # controls


def test_overflow_in_the_first_module_does_not_skip_the_front(monkeypatch):
    without = front_update(spoil=True)
    assert without.any() and not torch.equal(without, front_update())
    monkeypatch.setattr(Entry, '_admit', lambda self, grad: None)
    assert not front_update(spoil=True).any()  # control


def test_gradients_are_unscaled_before_they_are_clipped():
    norms = []
    for loss_scale in (1.0, 4096.0):
        model = build_classifier(18)
        wrapper = build_wrapper(
            model,
            amp=dict(dtype='float16', loss_scale=loss_scale),
            clip_grad=dict(max_norm=1e9),
        )
        train(model, wrapper, labelled_images(), steps=1)
        scalars = wrapper.message_hub.log_scalars
        norms.append(
            [scalars[f'train/module{i}/grad_norm'].current() for i in (1, 2, 3, 4)]
        )
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert min(norms[0]) > 0


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_local_losses_fall(dtype):
    model = build_classifier(18)
    wrapper = build_wrapper(
        model, amp=dict(dtype=dtype), optimizer=dict(type='AdamW', lr=1e-3)
    )
    train(model, wrapper, labelled_images(), steps=1)
    first = dict(wrapper.learner.losses)
    train(model, wrapper, labelled_images(), steps=12)
    for name, loss in wrapper.learner.losses.items():
        assert loss < 0.9 * first[name]


def test_boundaries_are_half_and_predictions_full():
    model = build_detector(detector_config('retinanet', 18))
    wrapper = build_wrapper(
        model, amp=dict(dtype='bfloat16'), recompute=['backbone.layer3']
    )
    maps, predictions = set(), set()
    for unit in (model.backbone.layer2[0], model.backbone.layer4[0]):
        unit.register_forward_pre_hook(lambda _m, args: maps.add(args[0].dtype))
    for head in wrapper.learner.heads:
        head.detector.head.register_forward_hook(
            lambda _m, _args, outputs: predictions.add(outputs[0][0].dtype)
        )
    train(model, wrapper, batch_of(1, 32, 32), steps=1)
    assert maps == {torch.bfloat16}  # half of the memory
    assert predictions == {torch.float32}


def test_the_amp_option_of_training_scripts():
    """``--amp`` writes mmengine's type into the config."""
    cfg = dict(
        LOCAL_LEARNING | dict(type='AmpOptimWrapper', loss_scale='dynamic'),
        optimizer=dict(type='SGD', lr=0.01),
    )
    wrapper = build_optim_wrapper(build_classifier(18), cfg)
    assert type(wrapper) is man_mm.AmpLocalLearningOptimWrapper
    assert wrapper.dtype == torch.bfloat16  # what autocast prefers on a CPU
    assert not any(scaler.is_enabled() for scaler in wrapper.scalers)


def test_loss_scales_are_resumed():
    model = build_classifier(18)
    amp = dict(dtype='float16')
    wrapper = build_wrapper(model, amp=amp)
    train(model, wrapper, labelled_images(), steps=1)
    wrapper.scalers[2].update(64.0)
    state = wrapper.state_dict()
    other = build_wrapper(build_classifier(18), amp=amp)
    other.load_state_dict(state)
    assert [s.get_scale() for s in other.scalers] == [65536, 65536, 64, 65536]
    # A run in single precision goes on in mixed precision, and the other way round.
    build_wrapper(build_classifier(18)).load_state_dict(state)
    other.load_state_dict(build_wrapper(model).state_dict())


@pytest.mark.parametrize('clears', [True, False])
def test_weights_are_cast_anew_after_an_update(clears, monkeypatch):
    """Autocast keeps half-precision copies of weights, which an update makes stale."""
    clear = torch.clear_autocast_cache
    if not clears:  # control
        monkeypatch.setattr(torch, 'clear_autocast_cache', lambda: None)
    model = build_classifier(18)
    wrapper = build_wrapper(
        model, amp=dict(dtype='bfloat16'), optimizer=dict(type='SGD', lr=1.0)
    )
    conv, x = model.backbone.conv1, torch.randn(1, 3, 16, 16)
    with wrapper.optim_context(model):
        data = model.data_preprocessor(labelled_images(), training=True)
        model(**data, mode='loss')
        after_the_step = conv(x)
        clear()
        assert torch.equal(after_the_step, conv(x)) == clears


@pytest.mark.parametrize(
    'amp, options, message',
    [
        (dict(dtype='int8'), {}, "optim_wrapper.dtype must be one of .* got 'int8'"),
        (dict(loss_scale='static'), {}, "optim_wrapper.loss_scale must be 'dynamic'"),
        (dict(loss_scale=0.0), {}, "a number above 0"),
        (dict(dtype='float16'), dict(update='parameter'), "set it to 'module'"),
    ],
)  # fmt: skip
def test_bad_options(amp, options, message):
    with pytest.raises(ValueError, match=message):
        build_wrapper(build_classifier(18), amp=amp, **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_one_module_equals_amp_of_mmengine():
    batch = labelled_images()
    stock, local = build_classifier(18).cuda(), build_classifier(18).cuda()
    options = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
    plain = build_optim_wrapper(stock, dict(type='AmpOptimWrapper', **options))
    wrapper = build_wrapper(local, amp={}, partition=dict(type='CutPartition', cuts=[]))
    assert same(train(stock, plain, batch), train(local, wrapper, batch))
