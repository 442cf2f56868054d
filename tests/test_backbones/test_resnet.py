"""Units of the ResNet family in mmdet and mmpretrain, and which backbones are refused.

What `find_units` and `probe` say is compared with hooks on a real forward pass.
"""

import dataclasses
import importlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from plain_backbones import conv, plain, unchanged
from torch import nn

import man_mm.backbones.base as base_file
from man_mm.backbones import Tap, find_units, probe, register_units
from man_mm.core import LocalLearner, MemoryBank, StagePartition, Unit, split

torch.set_num_threads(1)

NARROW = dict(base_channels=8)
NARROW_STEM = dict(base_channels=8, stem_channels=8)
# Four stages of 1, 1, 2 and 3 blocks.
REGNET = dict(w0=8, wa=10.0, wm=2.2, group_w=8, depth=7, bot_mul=1.0)


def build(package, name, **kwargs):
    """A randomly initialised backbone, as ``backbone`` of a model."""
    pytest.importorskip('mmcv')
    pytest.importorskip(package)
    torch.manual_seed(0)
    backbones = importlib.import_module(f'{package}.models.backbones')
    model = nn.Module()
    model.backbone = getattr(backbones, name)(**kwargs)
    return model


FAMILY = {
    'mmdet-r18': ('mmdet', 'ResNet', dict(depth=18, **NARROW)),
    'mmdet-r50': ('mmdet', 'ResNet', dict(depth=50, **NARROW)),
    'mmdet-r50-frozen': ('mmdet', 'ResNet', dict(depth=50, frozen_stages=1, **NARROW)),
    'mmdet-r50-caffe': ('mmdet', 'ResNet', dict(depth=50, style='caffe', **NARROW)),
    'mmdet-r18-2-stages': (
        'mmdet',
        'ResNet',
        dict(
            depth=18,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            **NARROW,
        ),
    ),
    'mmdet-r50-dilated': (
        'mmdet',
        'ResNet',
        dict(depth=50, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), **NARROW),
    ),
    'mmdet-r50-v1d': ('mmdet', 'ResNetV1d', dict(depth=50, **NARROW_STEM)),
    'mmdet-resnext': (
        'mmdet',
        'ResNeXt',
        dict(depth=50, groups=2, base_width=4, **NARROW),
    ),
    'mmdet-regnet': ('mmdet', 'RegNet', dict(arch=REGNET)),
    'mmdet-res2net': ('mmdet', 'Res2Net', dict(depth=50, base_width=4, **NARROW_STEM)),
    'mmdet-resnest': ('mmdet', 'ResNeSt', dict(depth=50, **NARROW_STEM)),
    'mmpretrain-r18': ('mmpretrain', 'ResNet', dict(depth=18, **NARROW_STEM)),
    'mmpretrain-r50': ('mmpretrain', 'ResNet', dict(depth=50, **NARROW_STEM)),
    'mmpretrain-r50-v1d': ('mmpretrain', 'ResNetV1d', dict(depth=50, **NARROW_STEM)),
    'mmpretrain-cifar': ('mmpretrain', 'ResNet_CIFAR', dict(depth=18, **NARROW_STEM)),
    'mmpretrain-se': ('mmpretrain', 'SEResNet', dict(depth=50, **NARROW_STEM)),
    'mmpretrain-resnext': (
        'mmpretrain',
        'ResNeXt',
        dict(depth=50, groups=2, width_per_group=4, **NARROW_STEM),
    ),
    'mmpretrain-regnet': ('mmpretrain', 'RegNet', dict(arch=REGNET)),
    'mmpretrain-res2net': (
        'mmpretrain',
        'Res2Net',
        dict(depth=50, base_width=4, **NARROW_STEM),
    ),
    'mmpretrain-resnest': ('mmpretrain', 'ResNeSt', dict(depth=50, **NARROW_STEM)),
}


@pytest.fixture(scope='module', params=FAMILY)
def model(request):
    package, name, kwargs = FAMILY[request.param]
    return build(package, name, **kwargs)


def observe(model, units, size):
    """Names, in the order in which they run, with the maps that they return."""
    seen, handles = [], []
    for name in {unit.name for unit in units}:

        def record(_module, _args, output, name=name):
            seen.append((name, output))

        handles.append(model.get_submodule(name).register_forward_hook(record))
    model.eval()
    with torch.no_grad():
        outputs = model.backbone(torch.randn(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return seen, outputs


def check_units(model, units):
    seen, outputs = observe(model, units, size=96)
    assert [name for name, _ in seen] == [unit.name for unit in units]
    # The cut behind the last unit would be behind the whole backbone.
    assert torch.equal(seen[-1][1], outputs[-1])
    parts = [part for unit in units for part in unit.parts]
    params = Counter(id(p) for m in parts for p in model.get_submodule(m).parameters())
    assert params == Counter({id(p): 1 for p in model.backbone.parameters()})


def test_units_run_in_order_and_cover_every_parameter_once(model):
    units = find_units(model)
    check_units(model, units)
    swapped = [units[0], units[2], units[1], *units[3:]]
    without_stem = [dataclasses.replace(units[0], parts=()), *units[1:]]
    for wrong in (swapped, units[:-1], without_stem, [*units, units[-1]]):
        with pytest.raises(AssertionError):
            check_units(model, wrong)


def test_stages_are_those_of_the_backbone(model):
    units = find_units(model)
    blocks = [len(getattr(model.backbone, name)) for name in model.backbone.res_layers]
    stages = [stage for stage, number in enumerate(blocks) for _ in range(number)]
    assert [unit.stage for unit in units] == [-1, *stages]
    names = zip(model.backbone.res_layers, blocks, strict=True)
    ends = [f'backbone.{name}.{number - 1}' for name, number in names]
    assert StagePartition().cuts(units) == ends[:-1]


def check_taps(model, units, taps, size=96):
    seen, _ = observe(model, units, size)
    assert taps == [
        Tap(unit.name, unit.stage, map_.shape[1], size // map_.shape[2])
        for unit, (_, map_) in zip(units, seen, strict=True)
    ]


def test_channels_and_strides_are_those_of_a_forward_pass(model):
    units = find_units(model)
    entry, taps = probe(model, units)
    assert entry == Tap('entry', -1, 3, 1)
    check_taps(model, units, taps)
    for change in (dict(stride=taps[3].stride * 2), dict(channels=1), dict(stage=7)):
        wrong = [*taps[:3], dataclasses.replace(taps[3], **change), *taps[4:]]
        with pytest.raises(AssertionError):
            check_taps(model, units, wrong)


def test_known_strides():
    # By hand, in case that both sides of the comparison are wrong alike.
    model = build('mmdet', 'ResNet', depth=18, **NARROW)
    _, taps = probe(model, find_units(model))
    assert [tap.name for tap in taps[:3]] == [
        'backbone.maxpool',
        'backbone.layer1.0',
        'backbone.layer1.1',
    ]
    assert [tap.stride for tap in taps] == [4, 4, 4, 8, 8, 16, 16, 32, 32]
    assert [tap.channels for tap in taps] == [8, 8, 8, 16, 16, 32, 32, 64, 64]
    cifar = build('mmpretrain', 'ResNet_CIFAR', depth=18, **NARROW_STEM)
    _, taps = probe(cifar, find_units(cifar))
    assert [tap.stride for tap in taps] == [1, 1, 1, 2, 2, 4, 4, 8, 8]


# What is refused.

HRNET = {
    f'stage{number}': dict(
        num_modules=1,
        num_branches=number,
        block='BASIC',
        num_blocks=(1,) * number,
        num_channels=tuple(4 * 2**i for i in range(number)),
    )
    for number in (1, 2, 3, 4)
}
TRIDENT = dict(
    depth=50,
    num_branch=3,
    test_branch_idx=1,
    trident_dilations=(1, 2, 3),
    num_stages=3,
    strides=(1, 2, 2),
    dilations=(1, 1, 1),
    out_indices=(2,),
)


@pytest.mark.parametrize(
    ('package', 'name', 'kwargs', 'reason'),
    [
        ('mmdet', 'TridentResNet', TRIDENT, 'several paths'),
        ('mmdet', 'DetectoRS_ResNet', dict(depth=50), 'several paths'),
        ('mmdet', 'HRNet', dict(extra=HRNET), 'several paths'),
        ('mmpretrain', 'TNT', dict(arch='s'), 'several paths'),
    ],
)
def test_other_backbones_are_refused_with_those_supported(
    package, name, kwargs, reason
):
    model = build(package, name, **kwargs)
    with pytest.raises(ValueError, match=f'backbone is a {name}, .*{reason}') as info:
        find_units(model)
    for family in ('ResNet', 'ResNeXt', 'RegNet', 'Res2Net', 'ResNeSt'):
        assert family in str(info.value).partition('Supported backbones: ')[2]


def test_a_model_without_backbone_is_refused():
    with pytest.raises(ValueError, match='Linear has no backbone.*Supported.*ResNet'):
        find_units(nn.Linear(2, 2))


@pytest.mark.parametrize('frozen', [-1, 1])
def test_the_probe_leaves_a_stock_model_as_it_was(frozen):
    model = build('mmdet', 'ResNet', depth=18, frozen_stages=frozen, **NARROW)
    model.train()
    units = find_units(model)
    assert unchanged(model, lambda: probe(model, units))


def test_a_family_can_be_added(monkeypatch):
    monkeypatch.setattr(base_file, 'ADAPTERS', dict(base_file.ADAPTERS))

    class Chain(nn.Sequential):
        pass

    class Longer(Chain):
        pass

    model = plain(lambda: Longer(conv(1, 2), conv(2, 3, 2)))
    found = [unit.name for unit in find_units(model)]
    assert found == ['backbone.0.1', 'backbone.1.1']

    @register_units('Chain')
    def chain_units(backbone):
        return [Unit(name, i) for i, (name, _) in enumerate(backbone.named_children())]

    units = find_units(model)
    assert units == [Unit('backbone.0', 0), Unit('backbone.1', 1)]
    entry, taps = probe(model, units)
    assert entry == Tap('entry', -1, 1, 1)
    assert taps == [Tap('backbone.0', 0, 2, 1), Tap('backbone.1', 1, 3, 2)]


# A stock backbone trains.


class PooledHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.classifier = nn.Linear(channels, 2)

    def forward(self, maps, targets, bank):
        pooled = torch.cat([map_.mean((2, 3)) for map_ in maps.values()], 1)
        return F.cross_entropy(self.classifier(pooled), targets)


def train_stock(with_cp, size=32):
    """Gradients of one step of a frozen-stem ResNet-18, K = 3."""
    model = build(
        'mmdet', 'ResNet', depth=18, frozen_stages=1, with_cp=with_cp, **NARROW
    )
    model.train()
    units = find_units(model)
    modules = split(model, units, StagePartition().cuts(units))
    assert [module.cut for module in modules] == [
        'backbone.layer2.1',  # the frozen first stage is part of this module
        'backbone.layer3.1',
        'backbone.layer4.1',
    ]
    torch.manual_seed(1)
    heads = [PooledHead(8 + 16), PooledHead(8 + 16 + 32)]
    stored = {}

    class Bank(MemoryBank):
        def store(self, name, map_, average=False):
            super().store(name, map_, average)
            stored[name] = map_.detach().clone()

    learner = LocalLearner(model, modules, heads, Bank())
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    with learner.step(labels):
        outputs = model.backbone(images)
    # No head reads the third; and blocks never write into what they are given.
    assert list(stored) == ['backbone.layer1.1', 'backbone.layer2.1']
    assert all(map(torch.equal, stored.values(), outputs[:2]))
    outputs[-1].square().mean().backward()
    return {name: param.grad for name, param in model.named_parameters()}


def test_a_stock_backbone_trains_module_by_module():
    grads = train_stock(with_cp=False)
    frozen = [name for name, grad in grads.items() if grad is None]
    assert frozen == [
        name for name in grads if 'layer' not in name or '.layer1.' in name
    ]


def test_checkpointed_blocks_have_the_same_gradients():
    grads, others = train_stock(with_cp=True), train_stock(with_cp=False)
    # Batch norm is in eval mode in mmdet, so that recomputing changes nothing.
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None)
        assert grad is None or torch.equal(grad, others[name]), name
