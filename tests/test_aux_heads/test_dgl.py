"""DGLHead is the network of its paper."""

import pytest
import torch
from conftest import build_cifar_classifier, build_wrapper, labelled_images
from torch import nn


@pytest.mark.parametrize('side', [28, 16, 6])
def test_pools_to_a_quarter_and_to_two_by_two(side):
    model = build_cifar_classifier()
    head = build_wrapper(model, aux_head=dict(type='DGLHead')).learner.heads[0]
    shapes = {}
    for name in ('convs', 'mlp'):
        head.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: shapes.update({name: args[0].shape[1:]})
        )
    targets = labelled_images(4)['data_samples']
    head({head.own: torch.randn(4, 8, side, side)}, targets, None)
    quarter = -(-side // 4)
    assert shapes == {'convs': (8, quarter, quarter), 'mlp': (4 * 8,)}


def test_layers():
    model = build_cifar_classifier()
    head = build_wrapper(model, aux_head=dict(type='DGLHead')).learner.heads[1]
    convs = [(x.in_channels, x.kernel_size) for x in head.convs if hasattr(x, 'stride')]
    assert convs == [(16, (1, 1))] * 3
    layers = [x for x in head.modules() if isinstance(x, nn.Linear)]
    assert [(x.in_features, x.out_features) for x in layers] == [
        (64, 64),
        (64, 64),
        (64, 10),
    ]
    norms = [
        m for m in head.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    assert len(norms) == 5
