"""CIFARResNet is the network of He et al. 2016, section 4.2."""

import pytest
import torch
import torch.nn.functional as F

from man_mm import CIFARResNet, UniformPartition
from man_mm.backbones import find_units, probe
from man_mm.backbones.cifar_resnet import BasicBlock


@pytest.mark.parametrize(
    ('depth', 'millions'), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)]
)
def test_parameters_are_those_of_table_6(depth, millions):
    backbone = CIFARResNet(depth)
    count = sum(p.numel() for p in backbone.parameters()) + 64 * 10 + 10
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.006)
    convs = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == depth - 1  # and the linear classifier


@pytest.mark.parametrize(('channels', 'side'), [(1, 28), (3, 32)])
def test_maps(channels, side):
    (map_,) = CIFARResNet(8, in_channels=channels)(torch.randn(2, channels, side, side))
    assert map_.shape == (2, 64, side // 4, side // 4)


def test_shortcuts_have_no_parameters():
    block = BasicBlock(4, 8, stride=2).eval()
    with torch.no_grad():
        block.norm2.weight.zero_()  # nothing but the shortcut is left
    x = torch.randn(2, 4, 7, 7)
    wanted = F.pad(F.avg_pool2d(x, 1, stride=2), (0, 0, 0, 0, 0, 4)).relu()
    assert torch.equal(block(x), wanted)
    assert not torch.equal(BasicBlock(4, 8, stride=2).eval()(x), wanted)  # control


def test_initial_weights():
    torch.manual_seed(0)
    backbone = CIFARResNet(20)
    backbone.init_weights()
    weight = backbone.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize('depth', [2, 18, 34, 111])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f'must be 6n . 2, such as .*; got {depth}'):
        CIFARResNet(depth)


@pytest.mark.parametrize(('depth', 'count'), [(32, 16), (110, 55)])
def test_every_block_can_be_a_module(depth, count):
    model = torch.nn.Module()
    model.backbone = CIFARResNet(depth)
    units = find_units(model)
    assert len(units) == count == len(probe(model, units)[1])
    cuts = UniformPartition(num_modules=count).cuts(units)
    assert cuts == [unit.name for unit in units[:-1]]
    # Four modules of four units each: those of the literature.
    if depth == 32:
        cuts = UniformPartition(num_modules=4).cuts(units)
        names = ['layer1.2', 'layer2.1', 'layer3.0']
        assert cuts == [f'backbone.{name}' for name in names]


def test_checkpointing_computes_the_same_twice():
    gradients, runs = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = CIFARResNet(14, base_channels=8, with_cp=with_cp)
        backbone.init_weights()
        counts = []
        backbone.layer2[0].conv1.register_forward_hook(lambda *_, c=counts: c.append(1))
        (map_,) = backbone(torch.ones(2, 3, 16, 16))
        map_.sum().backward()
        gradients.append([param.grad for param in backbone.parameters()])
        runs.append(len(counts))
    assert runs == [1, 2]
    assert all(map(torch.equal, *gradients))
