"""What all auxiliary heads of the literature share; each test has a control."""

import copy

import pytest
import torch
from conftest import (
    build_cifar_classifier,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
    watch_gradients,
)
from mmengine.registry import MODELS
from networks import LeakyCuts

HEADS = {
    'dgl': dict(type='DGLHead'),
    'predsim': dict(type='PredSimHead', beta=0.9),
    'infopro': dict(type='InfoProHead'),
    'infopro-ce': dict(type='InfoProHead', loss='cross_entropy'),
    'auglocal': dict(type='AugLocalHead'),
    'momentum': dict(type='MomentumHead'),
    'momentum-dgl': dict(type='MomentumHead', head=dict(type='DGLHead')),
}
EVERYWHERE = dict(type='UniformPartition', num_modules=4)
MIXUP = dict(train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]


def images(seed=0):
    torch.manual_seed(seed)
    return labelled_images(8, side=8, classes=4)


def build(head, partition=EVERYWHERE, model=None, **kwargs):
    model = model or build_cifar_classifier(8)
    return model, build_wrapper(model, aux_head=head, partition=partition, **kwargs)


def train(model, wrapper, steps=2, start=0):
    for step in range(start, start + steps):
        logs = model.train_step(images(step), wrapper)
    return logs


def values(module):
    return [value.clone() for value in module.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_parameter_of_every_module_and_head_learns(head):
    model, wrapper = build(head, update='iteration')
    heads = wrapper.learner.heads.named_parameters()
    learning = [(name, param) for name, param in heads if param.requires_grad]
    got = watch_gradients(wrapper, [*learning, *model.named_parameters()])
    assert torch.isfinite(train(model, wrapper)['loss'])
    losses = wrapper.learner.losses
    assert list(losses) == [f'module{i}' for i in range(1, 4)]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert learning and got and all(has for _, has in got)


def reached(model, wrapper, index):
    """Modules of which anything gets a gradient from one local loss."""
    learner = wrapper.learner

    def backward(loss, module, *_):
        if module.index == index:
            loss.backward()

    data = model.data_preprocessor(images(), training=True)
    with learner.step(data['data_samples'], backward):
        model(**data, mode='loss')
    return {
        module.index
        for module in learner.modules
        if any(p.grad is not None for p in learner.params(module))
    }


@pytest.mark.parametrize('index', [0, 2])
def test_a_local_loss_reaches_its_own_module_only(head, index):
    assert reached(*build(head), index) == {index}


def test_control_a_cut_that_does_not_detach(head, monkeypatch):
    monkeypatch.setattr('man_mm.core.learner.CutHooks', LeakyCuts)
    assert reached(*build(head), 2) == {0, 1, 2}


def test_local_losses_fall(head):
    optimizer = dict(type='AdamW', lr=3e-3)
    model, wrapper = build(head, optimizer=optimizer)
    batch = images()
    model.train_step(batch, wrapper)
    first = dict(wrapper.learner.losses)
    for _ in range(7):
        model.train_step(batch, wrapper)
    losses = wrapper.learner.losses
    assert [name for name in first if losses[name] > 0.95 * first[name]] == []


def test_the_model_stays_the_plain_model(head):
    stock = build_cifar_classifier(8)
    model, wrapper = build(head)
    # Whatever heads there are, the model starts from the same weights.
    assert same(values(stock), values(model))
    cfg = dict(type='CIFARResNet', depth=8)
    torch.manual_seed(3)
    plain = MODELS.build(cfg).conv1.weight
    torch.manual_seed(3)
    build_wrapper(model, aux_head=head, partition=EVERYWHERE)
    assert torch.equal(MODELS.build(cfg).conv1.weight, plain)
    train(model, wrapper)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not same(values(stock), values(model))  # control


def test_a_step_per_module_is_one_joint_step(head):
    kinds = ('module', 'iteration')
    (a, by_module), (b, jointly) = (build(head, update=kind) for kind in kinds)
    train(a, by_module)
    train(b, jointly)
    assert same(values(a), values(b))
    assert same(values(by_module.learner.heads), values(jointly.learner.heads))
    train(b, jointly, 1, start=2)  # control
    assert not same(values(a), values(b))


def test_resuming_ends_where_an_uninterrupted_run_ends(head):
    model, wrapper = build(head)
    train(model, wrapper)
    saved = copy.deepcopy((model.state_dict(), wrapper.state_dict()))
    train(model, wrapper, 2, start=2)
    for keep_heads in (True, False):
        resumed, other = build(head)
        resumed.load_state_dict(saved[0])
        fresh = copy.deepcopy(other.learner.heads.state_dict())
        other.load_state_dict(copy.deepcopy(saved[1]))
        if not keep_heads:  # control
            other.learner.heads.load_state_dict(fresh)
        train(resumed, other, 2, start=2)
        assert same(values(model), values(resumed)) == keep_heads


@pytest.mark.parametrize('name', [name for name in HEADS if name != 'momentum'])
def test_mixed_images(name):
    model, wrapper = build(HEADS[name], model=build_cifar_classifier(8, **MIXUP))
    if name == 'infopro':
        with pytest.raises(ValueError, match="aux_head.loss='cross_entropy'"):
            train(model, wrapper)
    else:
        assert torch.isfinite(train(model, wrapper)['loss'])
        assert all(torch.isfinite(loss) for loss in wrapper.learner.losses.values())


def test_detectors_are_refused(head):
    model = build_detector(detector_config('retinanet', 18))
    with pytest.raises(ValueError, match='model.head|enter the first'):
        build_wrapper(model, aux_head=head)
