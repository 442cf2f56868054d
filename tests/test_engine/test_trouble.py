"""Trouble in training: gradients that are not finite, images without boxes, memory."""

import copy

import pytest
import torch
from conftest import batch_of, build_detector, build_wrapper, detector_config

from man_mm.engine import skips, stepping


@pytest.fixture
def model():
    return build_detector(detector_config('retinanet', 18))


def moved(model, wrapper):
    """Which modules a step trains."""
    learner = wrapper.learner
    before = [copy.deepcopy(learner.params(m)) for m in learner.modules]
    model.train_step(batch_of(), wrapper)
    return [
        not all(torch.equal(a, b) for a, b in zip(old, learner.params(m), strict=True))
        for old, m in zip(before, learner.modules, strict=True)
    ]


@pytest.fixture
def broken(monkeypatch):
    """Makes a head's loss what it is told, through the head's real graph."""

    def break_head(head, value):
        def replaced(*args):
            losses = type(head).forward(head, *args)
            return dict(loss=losses['loss_cls'] * value)

        monkeypatch.setattr(head, 'forward', replaced)

    return break_head


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('update', ['module', 'iteration', 'parameter'])
def test_a_bad_loss_skips_its_own_module_only(model, broken, update, value):
    wrapper = build_wrapper(model, update=update)
    assert moved(model, wrapper) == [True] * 4  # control
    broken(wrapper.learner.heads[1], value)
    assert moved(model, wrapper) == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_clipping_by_value_does_not_hide_an_infinite_gradient(model, broken):
    wrapper = build_wrapper(model, clip_grad=dict(type='value', clip_value=0.1))
    broken(wrapper.learner.heads[1], float('inf'))
    assert moved(model, wrapper) == [True, False, True, True]


def test_a_global_norm_leaves_bad_modules_out(model, broken):
    wrapper = build_wrapper(
        model, clip_grad=dict(max_norm=1.0), update='iteration', clip='global'
    )
    broken(wrapper.learner.heads[1], float('nan'))
    assert moved(model, wrapper) == [True, False, True, True]


def test_a_module_that_stays_broken_ends_the_run(model, broken, monkeypatch):
    monkeypatch.setattr(skips, '_MOST_SKIPS', 2)
    wrapper = build_wrapper(model)
    for value in (float('nan'), 1.0):  # one good iteration starts the count again
        broken(wrapper.learner.heads[2], value)
        model.train_step(batch_of(), wrapper)
    broken(wrapper.learner.heads[2], float('nan'))
    for _ in range(2):
        model.train_step(batch_of(), wrapper)
    with pytest.raises(FloatingPointError, match=r"module3 .*'backbone.layer3.1'.*lr"):
        model.train_step(batch_of(), wrapper)


def test_each_parameter_at_once_is_updated_up_to_the_first_bad_gradient(
    model, monkeypatch
):
    monkeypatch.setattr(stepping, '_LEAST_BYTES', 1)
    wrapper = build_wrapper(model, update='parameter')
    moved(model, wrapper)  # makes the optimizer's state
    last, first = model.backbone.layer2[-1].conv2.weight, model.backbone.layer2[0]
    first.conv2.weight.register_hook(lambda grad: grad * float('nan'))
    before = [copy.deepcopy(p) for p in (last, first.conv1.weight)]
    assert moved(model, wrapper) == [True] * 4
    assert not torch.equal(before[0], last)
    assert torch.equal(before[1], first.conv1.weight)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('update', ['module', 'iteration', 'parameter'])
def test_a_bad_loss_skips_all_modules_of_an_exact_step(model, update):
    wrapper = build_wrapper(model, update=update, end_to_end_from=0)
    assert moved(model, wrapper) == [True] * 4  # control
    loss = model.bbox_head.loss_by_feat
    model.bbox_head.loss_by_feat = lambda *args, **kwargs: {
        name: [float('nan') * value for value in values]
        for name, values in loss(*args, **kwargs).items()
    }
    assert moved(model, wrapper) == [False] * 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_images_without_boxes(model):
    wrapper = build_wrapper(model)
    batch = batch_of()
    for sample in batch['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    before = copy.deepcopy(list(model.parameters()))
    model.train_step(batch, wrapper)
    assert all(loss.isfinite() for loss in wrapper.learner.losses.values())
    # All that they are told is that there is nothing.
    assert not torch.equal(before[0], next(model.parameters()))


def run_out_of_memory(*_):
    torch.empty(2**50, dtype=torch.uint8)


def run_out_of_cuda_memory(*_):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')


@pytest.mark.parametrize('error', [run_out_of_memory, run_out_of_cuda_memory])
@pytest.mark.parametrize('phase', ['forward', 'head', 'backward'])
def test_out_of_memory_names_the_module(model, error, phase):
    wrapper = build_wrapper(model)
    model.train_step(batch_of(), wrapper)  # control
    unit = model.backbone.layer3[0]
    calls = iter([error])  # not when it is measured what the module needs

    def fail(*args):
        next(calls, lambda *_: None)(*args)

    if phase == 'forward':
        unit.register_forward_hook(fail)
    elif phase == 'head':
        wrapper.learner.heads[2].register_forward_pre_hook(fail)
    else:
        unit.conv1.weight.register_hook(fail)
    kind = RuntimeError if error is run_out_of_memory else torch.OutOfMemoryError
    with pytest.raises(kind) as caught:
        model.train_step(batch_of(), wrapper)
    message = str(caught.value)
    assert "module3 of 4 ('backbone.layer3.0' to 'backbone.layer3.1')" in message
    assert 'predicted peak is ' in message and ' MiB' in message
    assert '--batch 2 --size 64 96 --num-modules 5' in message
    assert 'allocate' in message  # what torch said


def test_out_of_memory_in_the_last_module(model):
    wrapper = build_wrapper(model)
    model.bbox_head.retina_cls.weight.register_hook(run_out_of_cuda_memory)
    with pytest.raises(torch.OutOfMemoryError, match='module4 of 4'):
        model.train_step(batch_of(), wrapper)


def test_out_of_memory_in_a_second_run(model):
    wrapper = build_wrapper(model, end_to_end_from=0)
    model.backbone.layer3[0].conv1.weight.register_hook(run_out_of_cuda_memory)
    message = out_of_memory(model, wrapper)
    assert "module3 of 4 ('backbone.layer3.0' to 'backbone.layer3.1')" in message
    assert 'predicted' not in message  # for local steps


def out_of_memory(model, wrapper, batch=None):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model.train_step(batch or batch_of(), wrapper)
    assert 'CUDA out of memory' in str(caught.value)  # what torch said
    return str(caught.value)


@pytest.mark.parametrize('trained', [False, True])
def test_out_of_memory_before_the_model_runs(model, trained):
    wrapper = build_wrapper(model)
    if trained:  # the shape of an earlier batch says nothing of this one
        model.train_step(batch_of(), wrapper)
    model.data_preprocessor.register_forward_pre_hook(run_out_of_cuda_memory)
    assert 'before the first module' in out_of_memory(model, wrapper)


@pytest.mark.parametrize(
    'inputs, options',
    [
        (lambda batch: batch[:, :, None], '--batch 2 --num'),
        (lambda batch: list(batch), 'CONFIG --num'),
    ],
)
def test_out_of_memory_with_other_inputs_than_images(model, inputs, options):
    wrapper = build_wrapper(model)
    prepare = model.data_preprocessor.forward

    def prepared(*args):
        data = prepare(*args)
        return dict(data, inputs=inputs(data['inputs']))

    model.data_preprocessor.forward = prepared
    model.extract_feat = run_out_of_cuda_memory
    message = out_of_memory(model, wrapper)
    assert 'module1 of 4' in message and options in message


def test_other_errors_stay_as_they_are(model):
    wrapper = build_wrapper(model)

    def fail(*_):
        raise RuntimeError('something else')

    model.backbone.layer3[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='^something else$'):
        model.train_step(batch_of(), wrapper)
