"""MomentumHead follows the next unit, once for each update of the model."""

import pytest
import torch
from conftest import build_cifar_classifier, build_wrapper, labelled_images

from man_mm.aux_heads import copies

AT = dict(type='UniformPartition', num_modules=7)


def build(momentum=0.9, **kwargs):
    model = build_cifar_classifier()
    aux_head = dict(type='MomentumHead', momentum=momentum)
    return model, build_wrapper(model, aux_head=aux_head, partition=AT, **kwargs)


def train(model, wrapper, steps=1):
    for _ in range(steps):
        model.train_step(labelled_images(4, 16, classes=2), wrapper)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_both_copies_start_as_what_they_copy():
    model, wrapper = build()
    with torch.no_grad():  # weights and statistics that were loaded afterwards
        for tensor in model.backbone.state_dict().values():
            tensor += 0.125 if tensor.is_floating_point() else 3
    heads = wrapper.learner.heads
    names = [
        unit for stage in (1, 2, 3) for unit in (f'layer{stage}.0', f'layer{stage}.1')
    ]
    assert [head.copied for head in heads] == [f'backbone.{name}' for name in names]
    assert not same(heads[3].learned, model.get_submodule(heads[3].copied))  # control
    with wrapper.learner.step():
        for head in heads:
            unit = model.get_submodule(head.copied)
            assert same(head.learned, unit) and same(head.average, unit)
            assert not any(p.requires_grad for p in head.average.parameters())
            assert all(p.requires_grad for p in head.learned.parameters())
        data = model.data_preprocessor(labelled_images(4, 16), training=True)
        wrapper.learner.targets = data['data_samples']
        model(**data, mode='loss')


@pytest.mark.parametrize('update', ['module', 'iteration', 'parameter'])
def test_the_average_by_hand(update):
    model, wrapper = build(update=update)
    head = wrapper.learner.heads[2]
    unit = model.get_submodule(head.copied)
    weights = [unit.conv1.weight.clone()]
    for _ in range(3):
        train(model, wrapper)
        weights.append(unit.conv1.weight.clone())
    wanted = weights[0]
    for new in weights[1:3]:  # the third update counts from the next step on
        wanted = 0.9 * wanted + 0.1 * new
    torch.testing.assert_close(head.average.conv1.weight, wanted)
    assert not torch.allclose(wanted, 0.9 * wanted + 0.1 * weights[3])  # control
    assert not torch.equal(head.learned.conv1.weight, weights[0])  # it learns
    assert head.updates == 3


def test_accumulation_moves_the_average_once_an_update():
    model, wrapper = build()
    wrapper._accumulative_counts = 2
    wrapper.initialize_count_status(model, 0, 8)
    head = wrapper.learner.heads[2]
    unit = model.get_submodule(head.copied)
    before = unit.conv1.weight.clone()
    train(model, wrapper, 2)
    torch.testing.assert_close(head.average.conv1.weight, before)
    train(model, wrapper)  # follows the first update
    first = unit.conv1.weight.clone()
    wanted = 0.9 * before + 0.1 * first
    torch.testing.assert_close(head.average.conv1.weight, wanted)
    train(model, wrapper)  # completes the second one
    assert not torch.equal(unit.conv1.weight, first)
    torch.testing.assert_close(head.average.conv1.weight, wanted)
    assert head.updates == 2


def test_statistics_follow_the_unit():
    model, wrapper = build()
    train(model, wrapper, 2)
    head = wrapper.learner.heads[2]
    unit = model.get_submodule(head.copied)
    assert not torch.equal(head.average.norm1.running_mean, unit.norm1.running_mean)
    head.follow(model)
    assert torch.equal(head.average.norm1.running_mean, unit.norm1.running_mean)


def test_scale_weighs_both_copies():
    model, wrapper = build()
    head = wrapper.learner.heads[2].eval()
    torch.nn.init.normal_(head.learned.conv1.weight)
    map_ = torch.randn(2, 8, 16, 16)
    seen = []
    head.head.forward = lambda maps, *_: seen.append(maps[head.own])
    for scale in (1.0, 0.25):
        with torch.no_grad():
            head.scale.fill_(scale)
        head({head.own: map_}, None, None)
        learned, average = head.learned(map_), head.average(map_)
        wanted = scale * learned + (2 - scale) * average
        torch.testing.assert_close(seen[-1], wanted)
    assert not torch.allclose(*seen)  # control


def test_units_are_looked_up_once(monkeypatch):
    def refuse(_model):
        raise AssertionError('looked up again')

    model, wrapper = build()
    monkeypatch.setattr(copies, 'find_units', refuse)
    train(model, wrapper, 2)
    with pytest.raises(AssertionError, match='again'):  # control
        copies.unit_parts(model, wrapper.learner.heads[0].copied)


def test_a_resumed_average_goes_on():
    model, wrapper = build()
    train(model, wrapper, 2)
    state = wrapper.state_dict()
    for other in (wrapper, build()[1]):
        other.load_state_dict(state)
        before = other.learner.heads[2].average.conv1.weight.clone()
        new, _ = build()
        other.learner.heads[2].follow(new)
        unit = new.get_submodule(other.learner.heads[2].copied)
        wanted = 0.9 * before + 0.1 * unit.conv1.weight
        torch.testing.assert_close(other.learner.heads[2].average.conv1.weight, wanted)


def test_bad_momentum():
    with pytest.raises(ValueError, match='aux_head.momentum must be in'):
        build(momentum=1.0)
