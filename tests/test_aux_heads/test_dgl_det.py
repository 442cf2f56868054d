"""DGLDetHead trains a module of a detector from its own output alone."""

import pytest
import torch
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_wrapper,
    check_local_losses_fall,
    detector_config,
    watch_gradients,
)
from torch import nn

from man_mm.aux_heads.dgl_det import DGLDetHead
from man_mm.core.local_losses import total_loss

DGL = dict(type='DGLDetHead', channels=16)


def build(kind='retinanet', head=DGL, **kwargs):
    model = build_detector(detector_config(kind, 18))
    return model, build_wrapper(model, bank=False, aux_head=head, **kwargs)


def test_every_parameter_learns_without_a_bank(kind):
    model, wrapper = build(kind, update='iteration')
    heads = wrapper.learner.heads
    named = (*heads.named_parameters(), *model.named_parameters())
    got = watch_gradients(wrapper, named)
    assert torch.isfinite(model.train_step(batch_of(), wrapper)['loss'])
    assert list(wrapper.learner.losses) == ['module1', 'module2', 'module3']
    assert got and not [name for name, has in got if not has]


def seen(head, changed):
    """Whether the local loss of module 3 changes with a map of an earlier module."""
    torch.manual_seed(0)
    model, wrapper = build(head=head)
    targets = model.data_preprocessor(batch_of(), training=True)['data_samples']
    third, names = wrapper.learner.heads[2], ('layer1', 'layer2', 'layer3')
    shapes = ((16, 16, 24), (32, 8, 12), (64, 4, 6))
    maps = {
        f'backbone.{name}.1': torch.randn(2, *shape)
        for name, shape in zip(names, shapes, strict=True)
    }
    losses = []
    for _ in range(2):
        maps[changed] = torch.randn_like(maps[changed])
        with torch.no_grad():
            terms = third(maps, targets, None)
        losses.append(total_loss(terms))
    return not torch.equal(*losses)


def test_the_head_sees_its_own_module_only():
    assert not seen(DGL, 'backbone.layer2.1')
    assert seen(DGL, 'backbone.layer3.1')  # control
    assert seen(dict(type='MANDetHead', channels=16), 'backbone.layer2.1')  # control


def test_layers_and_levels():
    _, wrapper = build()
    for head, own, levels in zip(
        wrapper.learner.heads,
        (16, 32, 64),
        ([8, 16, 32, 64, 128], [8, 16, 32, 64, 128], [16, 32, 64, 128]),
        strict=True,
    ):
        assert isinstance(head, DGLDetHead)
        assert not head.needs_bank and not head.reads
        convs = [x for x in head.convs.modules() if isinstance(x, nn.Conv2d)]
        assert [(x.in_channels, x.kernel_size) for x in convs] == [
            (own, (1, 1)),
            (16, (1, 1)),
            (16, (1, 1)),
        ]
        assert head.detector.pyramid.levels == levels
        assert head.pool.kernel_size == (2 if own == 16 else 1)  # to stride 8
        assert not list(head.detector.pyramid.slm.parameters())


def test_local_losses_fall(kind):
    model = build_detector(detector_config(kind, 18))
    check_local_losses_fall(model, batch_of(), steps=8, aux_head=dict(DGL))


def test_it_refuses_what_it_cannot_train():
    with pytest.raises(ValueError, match='aux_head.channels must be at least 1'):
        build(head=dict(type='DGLDetHead', channels=0))
    with pytest.raises(ValueError, match='aux_head.cls_weight above 0'):
        build(head=dict(type='DGLDetHead', cls_weight=0))
    with pytest.raises(ValueError, match='trains detectors of mmdet'):
        build_wrapper(build_classifier(18), aux_head=dict(DGL))
