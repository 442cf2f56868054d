"""Optimizers that need all gradients at once: LAMB of mmpretrain."""

import pytest
import torch
from conftest import build_cifar_classifier, build_wrapper, labelled_images

from man_mm.engine import optim_wrapper
from man_mm.engine.optimizers import ELEMENTWISE, is_elementwise

LAMB = dict(type='mmpretrain.Lamb', lr=0.01, weight_decay=0.02)


def train(optimizer=LAMB, steps=2, **options):
    model = build_cifar_classifier()
    torch.manual_seed(0)
    wrapper = build_wrapper(
        model,
        optimizer=optimizer,
        partition=dict(type='UniformPartition', num_modules=4),
        **options,
    )
    for seed in range(steps):
        torch.manual_seed(seed)
        model.train_step(labelled_images(4, 16), wrapper)
    return list(model.parameters()), wrapper


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_lamb_updates_all_modules_together(monkeypatch):
    params, wrapper = train()
    assert wrapper.update == 'iteration'
    assert {group['step'] for group in wrapper.optimizer.param_groups} == {2}
    assert same(params, train(update='iteration')[0])
    monkeypatch.setattr(optim_wrapper, 'choose_update', lambda _, update: update)
    params, wrapper = train()  # control
    assert max(group['step'] for group in wrapper.optimizer.param_groups) == 8
    assert not same(params, train(update='iteration')[0])


def test_lamb_cannot_update_each_parameter():
    with pytest.raises(ValueError, match="'Lamb' may need.*update='iteration'.*SGD"):
        train(update='parameter', steps=0)


@pytest.mark.parametrize('kind', ELEMENTWISE)
def test_an_elementwise_optimizer_may_step_parts(kind):
    options = dict(type=kind.__name__, lr=0.01)
    by_module, wrapper = train(options)
    assert wrapper.update == 'module' and is_elementwise(wrapper.optimizer)
    assert same(by_module, train(options, update='iteration')[0])


def test_a_subclass_is_not_trusted():
    class Other(torch.optim.SGD):
        pass

    params = [torch.nn.Parameter(torch.zeros(1))]
    assert is_elementwise(torch.optim.SGD(params, 0.1))
    assert not is_elementwise(Other(params, 0.1))
