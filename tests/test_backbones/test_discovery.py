"""Units of backbones that have no adapter, found by running them once."""

import pytest
import torch
from gradients import (
    build_backbone,
    everywhere,
    exact_gradients,
    gradients_of_one_graph,
    images_for,
    local_gradients,
    plain_gradients,
    same,
)
from torch import nn

from man_mm.backbones import find_units, probe
from man_mm.backbones.discovery import discover_units
from man_mm.core import StagePartition, split

ARCH = {
    'edgenext': dict(channels=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_heads=[2] * 4),
    'mixer': dict(embed_dims=8, depth=4, patch_size=7, kernel_size=9),
    'poolformer': dict(
        layers=[1, 1, 2, 1], embed_dims=[8, 16, 24, 32], mlp_ratios=[2] * 4,
        layer_scale_init_value=1e-5,
    ),
    'repvgg': dict(
        num_blocks=[1, 2, 1, 1], width_factor=[0.125] * 4, group_layer_map=None,
        se_cfg=None,
    ),
    'densenet': dict(growth_rate=8, depths=[2, 2, 2, 2], init_channels=8),
}  # fmt: skip
# A backbone, the number of its units, and K when it is cut at its stages.
BACKBONES = {
    'detector of MobileNetV2': (
        dict(type='mmdet.MobileNetV2', widen_factor=0.25, out_indices=(1, 2, 4, 6)),
        18, 4,
    ),
    'MobileNetV2': (dict(type='mmpretrain.MobileNetV2', widen_factor=0.25), 19, 5),
    'MobileNetV3': (dict(type='mmpretrain.MobileNetV3'), 13, 4),
    'detector of EfficientNet': (
        dict(type='mmdet.EfficientNet', arch='b0', out_indices=(3, 4, 5)), 17, 3,
    ),
    'ShuffleNetV2': (dict(type='mmpretrain.ShuffleNetV2', widen_factor=0.5), 18, 3),
    'EdgeNeXt': (dict(type='mmpretrain.EdgeNeXt', arch=ARCH['edgenext']), 9, 4),
    'ConvMixer': (dict(type='mmpretrain.ConvMixer', arch=ARCH['mixer']), 9, 4),
    'PoolFormer': (
        dict(type='mmpretrain.PoolFormer', arch=ARCH['poolformer'], frozen_stages=-1),
        9, 4,
    ),
    'RepVGG': (dict(type='mmpretrain.RepVGG', arch=ARCH['repvgg']), 6, 4),
    'DenseNet': (dict(type='mmpretrain.DenseNet', arch=ARCH['densenet']), 8, 4),
    'AlexNet': (dict(type='mmpretrain.AlexNet'), 5, 4),
}  # fmt: skip


@pytest.fixture(params=BACKBONES)
def name(request):
    return request.param


def test_units_lie_on_one_path_and_own_each_parameter_once(name):
    cfg, count, k = BACKBONES[name]
    model = build_backbone(cfg)
    units = find_units(model)
    assert len(units) == count
    assert len(StagePartition().cuts(units)) + 1 == k
    probe(model, units)
    modules = split(model, units, [unit.name for unit in units[:-1]])
    owned = [param for module in modules for param in module.params]
    assert len(owned) == len({*map(id, owned)})
    assert {*map(id, owned)} == {*map(id, model.parameters())}


def test_each_loss_trains_its_own_module(name):
    cfg, *_ = BACKBONES[name]
    images = images_for(cfg)
    loss, local = local_gradients(cfg, images)
    plain_loss, plain = gradients_of_one_graph(cfg, images)
    assert torch.equal(loss, plain_loss)
    assert same(local, plain)
    _, elsewhere = gradients_of_one_graph(
        cfg, images, lambda units: everywhere(units)[1:]
    )
    assert not same(local, elsewhere)  # control


def test_exact_steps_are_plain_back_propagation(name):
    cfg, *_ = BACKBONES[name]
    images = images_for(cfg)
    plain = plain_gradients(cfg, images)
    assert same(exact_gradients(cfg, images), plain, rounding=1e-5)
    assert not same(local_gradients(cfg, images)[1], plain, rounding=1e-5)  # control


class Branching(nn.Module):
    """Three convolutions; what the others read of the first decides what to cut."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3))
        self.act = nn.ReLU(inplace=kind == 'in place')
        self.kind = kind

    def forward(self, x):
        a = self.blocks[0](x)
        b = self.blocks[1](self.act(a) if self.kind == 'in place' else a)
        if self.kind == 'skip':
            return (self.blocks[2](b + a),)
        if self.kind == 'function':
            return (self.blocks[2](torch.relu(b)),)
        c = self.blocks[2](b)
        return (c + a,) if self.kind == 'long skip' else (b, c)


@pytest.mark.parametrize(
    ('kind', 'names'),
    [
        ('none', ['blocks.0', 'blocks.1', 'blocks.2']),
        ('in place', ['act', 'blocks.1', 'blocks.2']),
        ('function', ['blocks.0', 'blocks.2']),
        ('skip', ['blocks.0', 'blocks.2']),
        ('long skip', ['blocks.0']),
    ],
)
def test_where_a_network_can_be_cut(kind, names):
    network = Branching(kind).eval()
    units = discover_units(network, torch.zeros(1, 3, 8, 8))
    assert [unit.name for unit in units] == names
    if kind == 'none':
        assert [unit.read_elsewhere for unit in units] == [False, True, False]
        assert [unit.stage for unit in units] == [-1, 0, 1]
    is_chain = [unit.as_map is None for unit in units]
    assert is_chain == [True, kind not in ('function', 'skip'), True][: len(units)]


def test_a_network_of_tokens_has_no_units():
    network = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4), nn.Linear(4, 4))
    assert discover_units(network, torch.zeros(1, 3, 8, 8)) == []


class Scaled(nn.Linear):
    def forward(self, x, scale=1):
        return super().forward(scale * x)


class Tokens(nn.Module):
    """Three blocks on tokens; a class token and positions are added in front."""

    def __init__(self, kind):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Scaled(8, 8) for _ in range(3))
        self.shared = nn.Parameter(torch.ones(8))
        self.kind = kind

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed(torch.arange(16))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x, self.shared) if self.kind == 'shared' else block(x)
        return (x,)


def test_parameters_outside_of_blocks_belong_to_the_unit_that_reads_them():
    units = discover_units(Tokens('own').eval(), torch.zeros(1, 3, 16, 16))
    assert [unit.parts for unit in units] == [
        ('proj', 'blocks.0'), ('blocks.1',), ('blocks.2',)
    ]  # fmt: skip
    assert units[0].params == ('cls_token', 'pos_embed.weight')
    assert [unit.gaps for unit in units] == [True, False, False]
    map_ = units[1].map_of(torch.zeros(2, 1 + 9, 8), ())
    assert map_.shape == (2, 8, 3, 3)
    assert discover_units(Tokens('shared').eval(), torch.zeros(1, 3, 16, 16)) == []
