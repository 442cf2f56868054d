"""Exact and joint steps of real models, and the dial that turns to them."""

import pytest
import torch
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    detector_config,
    image_pairs,
    labelled_images,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from man_mm.core import exact_steps
from man_mm.core.gradient_relay import injected

torch.set_num_threads(1)

SGD = dict(type='SGD', lr=1e-2, momentum=0.9, weight_decay=1e-4)


def build_swin():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 2, 1, 1], num_heads=[2] * 4),
        img_size=64,
        window_size=2,
        drop_path_rate=0.5,
    )
    head = dict(type='LinearClsHead', num_classes=10, in_channels=64)
    config = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=head,
        data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[64.0] * 3),
    )
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


def build_small_detector(kind):
    cfg = detector_config(kind, 18, frozen=1)
    cfg.model.neck.out_channels = 16
    heads = [cfg.model.get('bbox_head'), cfg.model.get('rpn_head')]
    for head in filter(None, heads):
        head.update(in_channels=16, feat_channels=16)
    if kind == 'faster_rcnn':
        cfg.model.roi_head.bbox_roi_extractor.out_channels = 16
        cfg.model.roi_head.bbox_head.in_channels = 16
    return build_detector(cfg)


NETWORKS = {
    'resnet': (lambda: build_classifier(18), labelled_images),
    'swin': (build_swin, labelled_images),
    'retinanet': (lambda: build_small_detector('retinanet'), batch_of),
    'faster_rcnn': (lambda: build_small_detector('faster_rcnn'), batch_of),
    'edsr': (lambda: build_restorer('edsr'), image_pairs),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return request.param


def train(name, model, wrapper, steps=2, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        batch = NETWORKS[name][1]()
        logs = model.train_step(batch, wrapper)
    return logs


def plain(name, steps=2, optimizer=SGD):
    model = NETWORKS[name][0]()
    wrapper = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(optimizer))
    )
    train(name, model, wrapper, steps)
    return model.state_dict()


def build_exact(name, **options):
    model = NETWORKS[name][0]()
    kept = {'end_to_end_from': 0, 'efficient_conv_bn_eval': False, **options}
    return model, build_wrapper(model, optimizer=options.pop('optimizer', SGD), **kept)


def exact(name, steps=2, **options):
    model, wrapper = build_exact(name, **options)
    train(name, model, wrapper, steps)
    return model.state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def close(a, b):
    return all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


def test_exact_steps_are_plain_training(network):
    assert same(exact(network), plain(network))


def test_a_boundary_gradient_that_is_scaled_is_found(network, monkeypatch):
    def scaled(tensors, grads):
        return injected(tensors, [1.01 * grad for grad in grads])

    monkeypatch.setattr(exact_steps, 'injected', scaled)
    assert not same(exact(network, steps=1), plain(network, steps=1))
