"""Strides and outputs of several families, and stock models that have them."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import (
    batch_of,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
)
from families import FAMILIES, build
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from man_mm.backbones import find_outputs, find_units, probe
from man_mm.backbones.transformers import vit_map


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
