"""AugLocalHead takes the layers that its paper takes."""

import pytest
import torch
from conftest import build_cifar_classifier, build_classifier, build_wrapper

from man_mm.aux_heads.auglocal import spread
from man_mm.backbones.cifar_resnet import BasicBlock


def heads_of(layers, num_modules, **options):
    model = build_cifar_classifier(layers)
    partition = dict(type='UniformPartition', num_modules=num_modules)
    aux_head = dict(type='AugLocalHead', **options)
    return build_wrapper(model, aux_head=aux_head, partition=partition).learner.heads


def test_layers_are_equally_far_from_each_other():
    layers = tuple(range(1, 16))  # ahead of layer 0
    assert spread(layers, 3) == [5, 10, 15]
    assert spread(layers, 2) == [8, 15]
    assert spread(layers, 1) == [15]
    assert spread(layers[-2:], 3) == [14, 15]
    assert spread(layers[-1:], 0) == [15]


@pytest.mark.parametrize(
    ('tau', 'depths'),
    [
        (0.5, [4] * 4 + [3] * 7 + [2] * 3 + [1]),
        (0.0, [4] * 12 + [3, 2, 1]),
        (1.0, [4] * 2 + [3] * 4 + [2] * 3 + [1] * 6),
    ],
)
def test_depth_falls_in_equal_steps(tau, depths):
    heads = heads_of(32, 16, depth=4, tau=tau)
    assert [len(head.blocks) for head in heads] == depths


def test_blocks_are_of_the_models_own_kind_and_width():
    head = heads_of(32, 16, depth=3)[0]
    blocks = [m for m in head.modules() if isinstance(m, BasicBlock)]
    shapes = [(m.conv1.in_channels, m.conv1.out_channels, m.stride) for m in blocks]
    assert shapes == [(8, 8, 1), (8, 16, 2), (16, 32, 2)]
    assert head.blocks(torch.randn(2, 8, 16, 16)).shape == (2, 32, 4, 4)


def test_a_skipped_stage_is_replaced():
    head = heads_of(32, 16, depth=1)[0]
    conv, norm, block = head.blocks[0]
    assert (conv.in_channels, conv.out_channels, conv.stride) == (8, 16, (2, 2))
    assert norm.num_features == 16 and block.stride == 2
    assert head.blocks(torch.randn(2, 8, 16, 16)).shape == (2, 32, 4, 4)


def test_weights_are_not_those_of_the_model():
    model = build_cifar_classifier()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7)
    head = build_wrapper(model, aux_head=dict(type='AugLocalHead')).learner.heads[0]
    assert not any((param == 7).any() for param in head.parameters())


@pytest.mark.parametrize('depth', [18, 50])
def test_on_a_stock_resnet(depth):
    model = build_classifier(depth)
    heads = build_wrapper(model, aux_head=dict(type='AugLocalHead')).learner.heads
    expansion = 4 if depth == 50 else 1
    map_ = torch.randn(2, 16 * expansion, 8, 8)
    assert heads[0].blocks(map_).shape == (2, 128 * expansion, 1, 1)


@pytest.mark.parametrize('options', [dict(depth=0), dict(tau=1.5)])
def test_bad_options(options):
    with pytest.raises(ValueError, match='aux_head.depth must be at least 1'):
        heads_of(14, 7, **options)
