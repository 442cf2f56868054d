"""VGG, ConvNeXt, Swin, ViT, Darknets and our CIFAR ResNet, cut at stages.

A training step by hooks is compared, bit for bit, with a loop that runs the network's
parts by hand and detaches in between.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, build
from torch import nn

from man_mm.backbones import find_units, probe
from man_mm.core import ExactSteps, LocalLearner, StagePartition, split

NUM_UNITS = {
    'cifar-resnet': 7,
    'vgg': 8,
    'convnext': 5,
    'swin': 5,
    'mmdet-swin': 5,
    'vit': 5,
    'darknet': 12,
    'csp-darknet': 10,
    'cspnext': 12,
    'ssd-vgg': 10,
}


# Gradients of several readers are added in another order, or laid out in another way.
ROUNDED = ('convnext', 'vit')


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


class PooledHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.classifier = nn.Linear(channels, 2)

    def forward(self, maps, targets, bank):
        (map_,) = maps.values()
        return F.cross_entropy(self.classifier(map_.mean((2, 3))), targets)


def stages_of(name, b, x):
    """Runs a backbone stage by stage: yields maps, and takes what goes on from there.

    It also yields a function of that, which returns the stage's output or None.
    """
    if name == 'cifar-resnet':
        x = b.relu(b.norm1(b.conv1(x)))
        for stage in (b.layer1, b.layer2, b.layer3):
            x = stage(x)
            x = yield x, x, lambda x, last=stage is b.layer3: x if last else None
    elif name == 'vgg':
        for stage, (start, stop) in enumerate(b.range_sub_modules):
            for index in range(start, stop):
                x = b.features[index](x)
            x = yield x, x, lambda x, stage=stage: x if stage in (1, 4) else None
    elif name == 'convnext':
        for stage in range(4):
            x = b.stages[stage](b.downsample_layers[stage](x))
            norm = getattr(b, f'norm{stage}', None)
            x = yield x, x, lambda x, norm=norm: norm(x) if norm else None
    elif name in ('darknet', 'csp-darknet', 'cspnext'):
        first, *stages = b.cr_blocks if name == 'darknet' else b.layers
        x = getattr(b, first)(x)
        for index, stage in enumerate(stages, start=1):
            x = getattr(b, stage)(x)
            read = index in b.out_indices
            x = yield x, x, lambda x, read=read: x if read else None
    elif name == 'ssd-vgg':
        starts = [0, 2, 5, 10, 15, 25]  # the pooling that halves the map begins one
        for stage, (start, stop) in enumerate(pairwise(starts)):
            x = b.features[start:stop](x)
            x = yield x, x, lambda x, stage=stage: x if stage in (3, 4) else None
    elif name == 'vit':
        x, size = b.patch_embed(x)
        x = torch.cat((b.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = b.pre_norm(b.drop_after_pos(x + b.pos_embed))
        for stage, layers in enumerate([(0, 1), (2,), (3,), (4,)]):
            for index in layers:
                x = b.layers[index](x)
            map_ = x[:, 1:].transpose(1, 2).unflatten(2, size)

            def output(x, stage=stage):
                x = b.ln1(x) if stage == 3 else x
                return x[:, 1:].transpose(1, 2).unflatten(2, size)

            x = yield x, map_, output if stage in (1, 3) else lambda _: None
    else:
        x, size = b.patch_embed(x)
        if getattr(b, 'use_abs_pos_embed', False):
            x = x + b.absolute_pos_embed
        x = b.drop_after_pos(x)
        for stage in range(4):
            for block in b.stages[stage].blocks:
                x = block(x, size)

            def output(x, stage=stage, size=size):
                x = getattr(b, f'norm{stage}')(x)
                return x.view(-1, *size, x.shape[2]).permute(0, 3, 1, 2)

            x = yield x, x.transpose(1, 2).unflatten(2, size), output
            if stage < 3:
                x, size = b.stages[stage].downsample(x, size)


def gradients(model, heads):
    named = [*model.named_parameters(), *heads.named_parameters()]
    return {name: param.grad for name, param in named}


def loss_of(outputs):
    return sum(output.square().mean() for output in outputs)


def by_hand(name, model, heads, images, labels, detaches=True):
    stages = stages_of(name, model.backbone, images)
    x, map_, output = next(stages)
    outputs = []
    for index in range(len(heads) + 1):
        if index < len(heads):
            heads[index]({'': map_}, labels, None).backward(retain_graph=not detaches)
            x = x.detach() if detaches else x
        outputs.append(output(x))
        if index < len(heads):
            x, map_, output = stages.send(x)
    loss_of([output for output in outputs if output is not None]).backward()
    return gradients(model, heads)


def prepare(name):
    model = build(name)
    units = find_units(model)
    modules = split(model, units, StagePartition().cuts(units))
    _, taps = probe(model, units)
    channels = {tap.name: tap.channels for tap in taps}
    torch.manual_seed(1)
    heads = nn.ModuleList(PooledHead(channels[m.cut]) for m in modules[:-1])
    return model, modules, heads, torch.randn(2, 3, 64, 64), torch.tensor([0, 1])


def by_hooks(name):
    model, modules, heads, images, labels = prepare(name)
    with LocalLearner(model, modules, heads).step(labels):
        outputs = model.backbone(images)
    loss_of(outputs).backward()
    return gradients(model, heads), model, modules


def same(a, b):
    def equal(x, y):
        return (x is None) == (y is None) and (x is None or torch.equal(x, y))

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def test_hooks_equal_a_loop_that_detaches(name):
    hooked, *_ = by_hooks(name)
    assert all(grad is not None for grad in hooked.values())
    model, _, *rest = prepare(name)
    assert same(hooked, by_hand(name, model, *rest))
    model, _, *rest = prepare(name)  # control
    assert not same(hooked, by_hand(name, model, *rest, detaches=False))


def exact_gradients(name):
    """Of an exact step over modules that begin and end within stages, too."""
    model, _, _, images, labels = prepare(name)
    units = find_units(model)
    modules = split(model, units, [unit.name for unit in units[1:-1:2]])
    heads = [nn.Identity() for _ in modules[1:]]
    steps = ExactSteps(LocalLearner(model, modules, heads))
    with steps.step(labels):
        loss = loss_of(model.backbone(images))
    loss.backward()
    steps.replay()
    return gradients(model, nn.Identity()), model.state_dict()


def test_an_exact_step_is_plain_back_propagation(name):
    model, _, _, images, _ = prepare(name)
    loss_of(model.backbone(images)).backward()
    plain, state = gradients(model, nn.Identity()), model.state_dict()
    grads, ours = exact_gradients(name)
    assert all(grad is not None for grad in plain.values())
    assert same(ours, state)
    assert same(grads, plain) != (name in ROUNDED)
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):  # control
        more = {key: 1.01 * grad for key, grad in grads.items()}
        torch.testing.assert_close(more, plain, rtol=1e-4, atol=1e-6)


def test_units_cover_the_network_on_one_path(name):
    model = build(name)
    units = find_units(model)
    assert len(units) == NUM_UNITS[name]
    entry, taps = probe(model, units)
    assert (entry.channels, entry.stride) == (3, 1)
    assert [tap.stage for tap in taps] == [unit.stage for unit in units]
    modules = split(model, units, [unit.name for unit in units[:-1]])
    owned = Counter(id(p) for module in modules for p in module.params)
    assert owned == Counter({id(p): 1 for p in model.parameters()})
    names = {id(p): n for n, p in model.named_parameters()}
    for module in modules[:-1]:  # norms behind outputs learn from the last loss
        tops = {names[id(p)].split('.')[1] for p in module.params}
        assert not tops & {'norm0', 'norm2', 'norm3', 'ln1'}
    if name in ('vit', 'swin'):
        first = {names[id(p)] for p in modules[0].params}
        assert any('pos_embed' in parameter for parameter in first)


def test_the_order_of_units_matters(name):
    model = build(name)
    units = find_units(model)
    with pytest.raises(ValueError, match='not on a single path'):
        probe(model, [units[1], units[0], *units[2:]])
