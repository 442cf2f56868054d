"""The contracts of local learning, on the super-resolution networks of mmagic."""

import copy

import pytest
import torch
from conftest import (
    RESTORERS,
    build_restorer,
    build_wrapper,
    image_pairs,
    train_restorer,
)
from mmengine.optim import build_optim_wrapper
from networks import LeakyCuts
from restorers import in_float64, same, weights

from man_mm import MemoryBank
from man_mm.core.local_losses import total_loss

torch.set_num_threads(1)

ADAM = dict(type='Adam', lr=1e-3)
END_TO_END = dict(type='CutPartition', cuts=[])


@pytest.fixture(params=RESTORERS)
def name(request):
    return request.param


def watch_boundaries(model, learner):
    """What enters each module but the first from now on."""
    seen = []
    for module in learner.modules[1:]:
        first = model.get_submodule(module.parts[0])
        first.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    return seen


class TestIsolation:
    """Each local loss reaches its own module and head alone.

    A global skip is no exception, as the front gets both its gradients, added, in the
    backward pass of the last module, which owns it.
    """

    @staticmethod
    def reached(model, learner):
        named = [*model.named_parameters(), *learner.heads.named_parameters('heads')]
        found = []

        def collect():
            found.append({name for name, p in named if p.grad is not None})
            for _, param in named:
                param.grad = None

        def backward(loss, module, complete):
            loss.backward(retain_graph=True)
            collect()

        data = model.data_preprocessor(image_pairs(), training=True)
        with learner.step(data['data_samples'], backward):
            losses = model(**data, mode='loss')
        model.parse_losses(losses)[0].backward()
        collect()
        names = {id(param): name for name, param in named}
        owned = [{names[id(p)] for p in learner.params(m)} for m in learner.modules]
        assert sum(map(len, owned)) == len(named)
        return found, owned

    def test_each_loss_trains_its_own_module(self, name):
        model = build_restorer(name)
        learner = build_wrapper(model).learner
        assert len(learner.modules) == 4
        seen = watch_boundaries(model, learner)
        found, owned = self.reached(model, learner)
        assert found == owned
        assert len(seen) == 3
        assert all(x.grad_fn is None and not x.requires_grad for x in seen)

    def test_control_a_cut_that_does_not_detach(self, name, monkeypatch):
        monkeypatch.setattr('man_mm.core.learner.CutHooks', LeakyCuts)
        model = build_restorer(name)
        learner = build_wrapper(model).learner
        seen = watch_boundaries(model, learner)
        found, owned = self.reached(model, learner)
        assert all(x.requires_grad for x in seen)
        assert found[0] == owned[0]
        assert all(a > b for a, b in zip(found[1:], owned[1:], strict=True))


FRONT_LAYERS = {'edsr': 'conv_first', 'rdn': 'sfe1'}
# By hand: what is in front of the body, what leads into it, and what is behind it.
FRONTS = {
    'edsr': lambda net, x: net.conv_first((x - net.mean) / net.std),
    'rdn': lambda net, x: net.sfe1(x),
}
INTO = {'edsr': lambda net, x: x, 'rdn': lambda net, x: net.sfe2(x)}
TAILS = {
    'edsr': lambda net, shallow, maps: (
        net.conv_last(net.upsample(net.conv_after_body(maps[-1]) + shallow)) * net.std
        + net.mean
    ),
    'rdn': lambda net, shallow, maps: net.output(
        net.upscale(net.gff(torch.cat(maps, 1)) + shallow)
    ),
}


class TestOracle:
    """One local step is a loop that detaches by hand, in float64."""

    @staticmethod
    def params(name, model, learner):
        """All parameters, and names of those in front of the body."""
        front = f'generator.{FRONT_LAYERS[name]}'
        params = dict(model.named_parameters())
        params.update(learner.heads.named_parameters('heads'))
        return params, [f'{front}.weight', f'{front}.bias']

    def armed(self, name, **options):
        model, wrapper, data = in_float64(name, **options)
        with wrapper.learner.step(data['data_samples']):
            losses = model(**data, mode='loss')
        model.parse_losses(losses)[0].backward()
        params, front = self.params(name, model, wrapper.learner)
        return {key: param.grad for key, param in params.items()}, front

    def by_hand(self, name, parts=('first', 'last'), **options):
        model, wrapper, data = in_float64(name, **options)
        learner, net, samples = wrapper.learner, model.generator, data['data_samples']
        shallow = FRONTS[name](net, data['inputs'])
        x, losses, earlier = INTO[name](net, shallow), [], []
        for module in learner.modules:
            maps = {}
            for unit in module.units:
                maps[unit.name] = x = model.get_submodule(unit.name)(x)
            if module.is_last:
                outputs = TAILS[name](net, shallow, [*earlier, *maps.values()])
                losses.append(model.pixel_loss(outputs, samples.gt_img))
            else:
                entry = {'entry': shallow.detach()}
                head = learner.heads[module.index]
                losses.append(
                    total_loss(head({**entry, **maps}, samples, MemoryBank()))
                )
                earlier += [map_.detach() for map_ in maps.values()]
                x = x.detach()
        both = dict(first=losses[0], last=losses[-1])
        params, front = self.params(name, model, learner)
        grads = {}
        for keys, loss in (
            (front, sum(both[part] for part in parts)),
            (params.keys() - front, sum(losses)),
        ):
            some = [params[key] for key in keys]
            found = torch.autograd.grad(loss, some, retain_graph=True)
            grads.update(zip(keys, found, strict=True))
        return grads

    @staticmethod
    def check(grads, others):
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, others[name], rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize('num_modules', [2, 4])
    @pytest.mark.parametrize('name', ['edsr', 'rdn'])
    def test_a_loop_by_hand(self, name, num_modules):
        place = dict(edsr='body', rdn='rdbs')[name]
        cuts = [f'generator.{place}.{i}' for i in (1, 3, 5)][: num_modules - 1]
        partition = dict(type='CutPartition', cuts=cuts)
        armed, front = self.armed(name, partition=partition)
        self.check(armed, self.by_hand(name, partition=partition))
        for part in ('first', 'last'):  # control: half of the front's gradient
            half = self.by_hand(name, [part], partition=partition)
            for key in front:
                with pytest.raises(AssertionError):
                    self.check({key: armed[key]}, {key: half[key]})


def test_one_module_is_plain_training(name):
    plain, local = build_restorer(name), build_restorer(name)
    stock = build_optim_wrapper(plain, dict(type='OptimWrapper', optimizer=dict(ADAM)))
    wrapper = build_wrapper(local, optimizer=ADAM, partition=END_TO_END)
    assert len(wrapper.learner.modules) == 1
    assert (
        train_restorer(plain, stock)['loss'] == train_restorer(local, wrapper)['loss']
    )
    assert same(plain.state_dict(), local.state_dict())
    cut = build_restorer(name)  # control
    train_restorer(cut, build_wrapper(cut, optimizer=ADAM))
    assert not same(plain.state_dict(), cut.state_dict())


def test_all_ways_to_update_are_equal(name):
    states = []
    runs = [('module', 2), ('iteration', 2), ('parameter', 2), ('module', 1)]
    for update, steps in runs:
        model = build_restorer(name)
        wrapper = build_wrapper(model, optimizer=ADAM, update=update)
        train_restorer(model, wrapper, steps)
        states.append(weights(model, wrapper))
    first, *others, control = states
    assert all(same(first, other) for other in others)
    assert not same(first, control)


def test_swinir_may_checkpoint_itself():
    grads = []
    for use_checkpoint in (False, True):
        model = build_restorer(
            'swinir', use_checkpoint=use_checkpoint, drop_path_rate=0.0
        )
        wrapper = build_wrapper(model, update='iteration')
        data = model.data_preprocessor(image_pairs(), training=True)
        with wrapper.optim_context(model):
            losses = model(**data, mode='loss')
        model.parse_losses(losses)[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert not [name for name, grad in grads[1].items() if grad is None]
    torch.testing.assert_close(*grads)


class TestPlainModel:
    """Outside its steps, the model is the plain model."""

    @staticmethod
    def predict(model):
        model.eval()
        images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outputs = model(images, mode='tensor')
        model.train()
        return outputs

    def test_before_and_after_training(self, name):
        model, plain = build_restorer(name), build_restorer(name)
        before = copy.deepcopy(model.state_dict())
        wrapper = build_wrapper(model)
        assert same(model.state_dict(), plain.state_dict())
        assert same(model.state_dict(), before)
        assert list(model.state_dict()) == list(before)
        assert torch.equal(self.predict(model), self.predict(plain))
        train_restorer(model, wrapper)
        assert list(model.state_dict()) == list(before)
        assert not torch.equal(self.predict(model), self.predict(plain))  # control
        plain.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(self.predict(model), self.predict(plain))
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        ('name', 'size'), [*((name, None) for name in RESTORERS), ('srresnet', 1)]
    )
    def test_nothing_is_left_on_the_model(self, name, size):
        model = build_restorer(name)
        wrapper = build_wrapper(model, micro_batch_size=size)
        data = model.data_preprocessor(image_pairs(), training=True)
        with wrapper.optim_context(model):
            assert self.traces(model)  # control
            losses = model(**data, mode='loss')
        assert not self.traces(model) and not wrapper.learner.bank
        wrapper.update_params(model.parse_losses(losses)[0])
        with pytest.raises(ZeroDivisionError), wrapper.optim_context(model):
            model(**data, mode='loss')
            raise ZeroDivisionError
        assert not self.traces(model) and not wrapper.learner.bank

    @staticmethod
    def traces(model):
        return [
            m
            for m in model.modules()
            if m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m)
        ]
