"""VGG, ConvNeXt, Swin, ViT, Darknets and our CIFAR ResNet, cut at stages.

A training step by hooks is compared, bit for bit, with a loop that runs the network's
parts by hand and detaches in between.
"""

import copy
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    batch_of,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
)
from mmdet.models.backbones import Darknet
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from man_mm.backbones import find_outputs, find_units, probe
from man_mm.backbones.transformers import vit_map
from man_mm.core import ExactSteps, LocalLearner, StagePartition, split

SWIN = dict(window_size=2, drop_path_rate=0.0, out_indices=(0, 1, 2, 3))
SMALL_CSP = dict(widen_factor=0.125, deepen_factor=0.33)
FAMILIES = {
    'cifar-resnet': dict(type='CIFARResNet', depth=14, base_channels=8),
    'vgg': dict(
        type='mmpretrain.VGG',
        depth=11,
        norm_cfg=dict(type='BN'),
        out_indices=(1, 4),
    ),
    'convnext': dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 2, 1, 1], channels=[8, 8, 16, 16]),
        out_indices=(0, 2, 3),
        gap_before_final_norm=False,
    ),
    'swin': dict(
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[2] * 4),
        img_size=64,
        use_abs_pos_embed=True,
        **SWIN,
    ),
    'mmdet-swin': dict(
        type='mmdet.SwinTransformer',
        embed_dims=8,
        depths=[1, 2, 1, 1],
        num_heads=[2] * 4,
        **SWIN,
    ),
    'vit': dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=8, num_layers=5, num_heads=2, feedforward_channels=8),
        img_size=64,
        out_indices=[2, 4],
        out_type='featmap',
    ),
    'darknet': dict(type='mmdet.Darknet', depth=13),
    'csp-darknet': dict(type='mmdet.CSPDarknet', **SMALL_CSP),
    'cspnext': dict(type='mmdet.CSPNeXt', **SMALL_CSP),
    'ssd-vgg': dict(type='mmdet.SSDVGG', depth=11, out_feature_indices=(14, 24)),
}
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
# mmdet has only the one with 53 layers: blocks and widths of its stages.
DARKNET = ((1, 1, 2, 1, 1), ((32, 8), (8, 8), (8, 16), (16, 16), (16, 32)))

# Gradients of several readers are added in another order, or laid out in another way.
ROUNDED = ('convnext', 'vit')


@pytest.fixture(autouse=True)
def darknet_of_13_layers(monkeypatch):
    monkeypatch.setattr(Darknet, 'arch_settings', {13: DARKNET})


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def build(name):
    for package in ('mmdet', 'mmpretrain'):
        init_default_scope(package)
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = MODELS.build(copy.deepcopy(FAMILIES[name]))
    return model.train()


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


def classifier(name):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = {**FAMILIES[name], 'out_indices': (3,)}
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=copy.deepcopy(backbone),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
            data_preprocessor=dict(mean=[127.5] * 3, std=[64.0] * 3),
        )
    )
    model.init_weights()
    return model.train()


@pytest.mark.parametrize('family', ['swin'])
def test_a_classifier_trains_and_stays_plain(family):
    stock, model = classifier(family), classifier(family)
    wrapper = build_wrapper(model)
    for _ in range(2):
        model.train_step(labelled_images(), wrapper)
    assert len(wrapper.learner.losses) == 3
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for head in ('AugLocalHead', 'MomentumHead'):
        with pytest.raises(ValueError, match='works on tokens'):
            build_wrapper(model, aux_head=dict(type=head))


@pytest.mark.parametrize(
    ('family', 'strides'),
    [
        ('darknet', [2, 4, 8, 16, 32]),
        ('csp-darknet', [4, 8, 16, 32]),
        ('cspnext', [4, 8, 16, 32]),
        ('ssd-vgg', [1, 2, 4, 8, 16]),
    ],
)
def test_strides_of_stages_and_outputs(family, strides):
    model = build(family)
    entry, taps = probe(model, find_units(model))
    assert entry.channels == 3  # although YOLOX begins with 12 channels
    ends = {tap.stage: tap for tap in taps if tap.stage >= 0}
    assert [tap.stride for tap in ends.values()] == strides
    shapes = [(tap.channels, tap.stride) for tap in find_outputs(model)]
    last = list(ends.values())[-len(shapes) :]
    assert shapes == [(end.channels, end.stride) for end in last]
    assert len(shapes) == (2 if family == 'ssd-vgg' else 3)


def test_finding_outputs_leaves_the_model_as_it_was():
    model = build('csp-darknet')
    before = copy.deepcopy(model.state_dict())
    find_outputs(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.backbone(torch.randn(2, 3, 64, 64))  # control
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_windows_as_large_as_those_of_stock_swin():
    model = build('swin')
    cfg = copy.deepcopy(FAMILIES['swin'])
    cfg.update(window_size=7, img_size=224)
    model.backbone = MODELS.build(cfg)
    _, taps = probe(model, find_units(model))
    assert [tap.stride for tap in taps] == [4, 8, 8, 16, 32]


def test_outputs_behind_the_patch_merging_are_refused():
    model = build('swin')
    model.backbone.out_after_downsample = True
    with pytest.raises(ValueError, match='out_after_downsample=True'):
        find_units(model)


def test_patches_of_other_images():
    tokens = torch.randn(2, 1 + 9, 4)
    map_ = vit_map(tokens, (), extra=1, size=(2, 3))
    assert torch.equal(map_[1, :, 1, 2], tokens[1, 1 + 5])
    with pytest.raises(ValueError, match='8 patches are neither 2×3 nor a square'):
        vit_map(tokens[:, :9], (), extra=1, size=(2, 3))


def detector(name):
    cfg = detector_config('retinanet', 18)
    cfg.model.backbone = copy.deepcopy(FAMILIES[name])
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    widths = [8, 8, 16, 16] if name == 'convnext' else [8, 16, 32, 64]
    cfg.model.neck.in_channels = widths
    return build_detector(cfg)


@pytest.mark.parametrize('family', ['mmdet-swin', 'convnext'])
def test_a_detector_trains(family):
    model = detector(family)
    wrapper = build_wrapper(model, optimizer=dict(type='AdamW', lr=1e-3))
    before = {name: param.clone() for name, param in model.named_parameters()}
    model.train_step(batch_of(), wrapper)
    assert list(wrapper.learner.losses) == ['module1', 'module2', 'module3']
    after = dict(model.named_parameters())
    still = [name for name in before if torch.equal(before[name], after[name])]
    # RetinaNet's neck does not read the first stage.
    assert {name.split('.')[1] for name in still} <= {'norm0'}


def test_stock_vgg_starts():
    """Its fully connected layers want images of 224 pixels."""
    init_default_scope('mmpretrain')
    configs = Path(find_spec('mmpretrain').origin).parent / '.mim/configs'
    model = MODELS.build(Config.fromfile(configs / 'vgg/vgg11bn_8xb32_in1k.py').model)
    with pytest.raises(RuntimeError, match='cannot be multiplied'):  # control
        model.backbone(torch.zeros(1, 3, 64, 64))
    learner = build_wrapper(model).learner
    assert [module.units[-1].stage for module in learner.modules] == [0, 1, 2, 3, 4]
    assert learner.heads[0].classifier.num_classes == 1000


def test_a_probe_that_fails_says_what_it_did():
    model = build('vgg')
    units = find_units(model)

    def fail(*_):
        raise RuntimeError('too small')

    model.get_submodule(units[-2].name).register_forward_hook(fail)
    message = f'VGG was run on a black image of 64×64 .*{units[-1].name}.*: too small'
    with pytest.raises(ValueError, match=message):
        probe(model, units)
    assert all(module.training for module in model.modules())
