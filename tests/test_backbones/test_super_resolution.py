"""Units of mmagic's super-resolution networks, and what enters the first of them."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from conftest import RESTORERS, build_restorer
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from man_mm.backbones import Tap, find_scale, find_units, image_channels, probe
from man_mm.core import StagePartition, split

BLOCKS = {
    'edsr': 'body',
    'srresnet': 'trunk_net',
    'rrdb': 'body',
    'rdn': 'rdbs',
    'swinir': 'layers',
}
# What runs before the first block: in the first unit, or in the last module.
BEFORE = {
    'edsr': ([], ['conv_first']),
    'srresnet': (['conv_first', 'lrelu'], []),
    'rrdb': ([], ['conv_first']),
    'rdn': (['sfe2'], ['sfe1']),
    'swinir': (['patch_embed', 'pos_drop'], ['conv_first']),
}


@pytest.fixture(scope='module', params=RESTORERS)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def model(name):
    return build_restorer(name)


def block_names(name, model):
    blocks = model.generator.get_submodule(BLOCKS[name])
    return [f'generator.{BLOCKS[name]}.{index}' for index in range(len(blocks))]


def observe(model, units, size=32):
    """Each unit's name, arguments and output in the order of a real forward pass."""
    seen, handles = [], []
    for name in dict.fromkeys(unit.name for unit in units):

        def record(_module, args, output, name=name):
            seen.append((name, args, output))

        handles.append(model.get_submodule(name).register_forward_hook(record))
    with torch.no_grad():
        model.generator(torch.rand(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return seen


def check_units(name, model, units):
    seen = observe(model, units)
    assert [unit.name for unit in units] == block_names(name, model)
    assert [unit_name for unit_name, *_ in seen] == [unit.name for unit in units]
    for (_, _, output), (_, args, _) in zip(seen, seen[1:], strict=False):
        assert args[0] is output
    inside, _ = BEFORE[name]
    parts = [part for unit in units for part in unit.parts]
    assert parts == [
        *(f'generator.{part}' for part in inside),
        *block_names(name, model),
    ]


def test_units_are_the_blocks_on_one_path(name, model):
    units = find_units(model)
    check_units(name, model, units)
    swapped = [units[0], units[2], units[1], *units[3:]]
    for wrong in (swapped, units[:-1], [*units, units[-1]]):
        with pytest.raises(AssertionError):
            check_units(name, model, wrong)


def check_owners(name, model, modules):
    """Every parameter has one owner: its unit's module, or else the last one."""
    owned = Counter(id(p) for module in modules for p in module.params)
    assert owned == Counter({id(p): 1 for p in model.parameters()})
    names = {id(param): name for name, param in model.named_parameters()}
    inside, outside = BEFORE[name]
    for module in modules:
        places = {names[id(p)] for p in module.params}
        parts = [unit.name for unit in module.units]
        if module.index == 0:
            parts += [f'generator.{part}' for part in inside]
        if module.is_last:
            tops = {place.split('.')[1] for place in places}
            assert {*outside, BLOCKS[name]} < tops  # and an upsampler at least
            assert not tops & set(inside)
            places = {p for p in places if p.startswith(f'generator.{BLOCKS[name]}.')}
        assert places == {
            f'{part}.{param}'
            for part in parts
            for param, _ in model.get_submodule(part).named_parameters()
        }


def test_every_parameter_has_exactly_one_owner(name, model):
    units = find_units(model)
    check_owners(
        name, model, modules := split(model, units, StagePartition().cuts(units))
    )
    first, *others, last = modules
    less = dataclasses.replace(last, params=last.params[1:])
    more = dataclasses.replace(first, params=(*first.params, last.params[0]))
    for wrong in ([first, *others, less], [more, *others, last]):
        with pytest.raises(AssertionError):
            check_owners(name, model, wrong)


@pytest.mark.parametrize(
    ('blocks', 'stages'),
    [(1, [0]), (2, [0, 2]), (5, [0, 0, 1, 2, 3]), (8, [0, 0, 0, 1, 1, 2, 2, 3])],
)
def test_body_has_four_stages_the_last_one_shorter(blocks, stages):
    model = build_restorer('edsr', num_blocks=blocks)
    units = find_units(model)
    assert [unit.stage for unit in units] == stages
    modules = split(model, units, StagePartition().cuts(units))
    assert len(modules) == len(set(stages))


# By hand: channels and stride of what enters, and those of all units.
TAPS = {
    'edsr': ((8, 1), (8, 1)),
    'srresnet': ((3, 1), (8, 1)),  # the image itself
    'rrdb': ((8, 2), (8, 2)),  # whose network folds space into channels
    'rdn': ((8, 1), (8, 1)),
    'swinir': ((12, 1), (12, 1)),
}


def check_taps(model, units, taps, size=32):
    for unit, tap, (_, args, output) in zip(
        units, taps, observe(model, units, size), strict=True
    ):
        map_ = unit.as_map(output, args) if unit.as_map else output
        side = size // tap.stride
        assert map_.shape == (1, tap.channels, side, side)
        assert (tap.name, tap.stage) == (unit.name, unit.stage)


def test_channels_and_strides(name, model):
    units = find_units(model)
    entry, taps = probe(model, units)
    entered, inside = TAPS[name]
    assert entry == Tap('entry', -1, *entered)
    assert {(tap.channels, tap.stride) for tap in taps} == {inside}
    check_taps(model, units, taps)
    for change in (dict(stride=4), dict(channels=1), dict(stage=7)):
        wrong = [dataclasses.replace(taps[0], **change), *taps[1:]]
        with pytest.raises(AssertionError):
            check_taps(model, units, wrong)


def test_other_scales_have_other_strides():
    strides = {}
    for scale in (1, 2, 4):
        model = build_restorer('rrdb', scale)
        entry, taps = probe(model, find_units(model))
        strides[scale] = {tap.stride for tap in (entry, *taps)}
    assert strides == {1: {4}, 2: {2}, 4: {1}}


def test_tokens_are_seen_as_maps_without_a_copy():
    model = build_restorer('swinir')
    units = find_units(model)
    image = torch.rand(2, 3, 8, 16)
    calls = []
    layer = model.get_submodule(units[0].name)
    layer.register_forward_hook(lambda _m, args, output: calls.append((args, output)))
    model.generator(image)
    ((args, tokens),) = calls
    map_ = units[0].as_map(tokens, args)
    assert tokens.shape == (2, 8 * 16, 12) and map_.shape == (2, 12, 8, 16)
    assert torch.equal(map_, model.generator.patch_unembed(tokens, (8, 16)))
    assert torch.equal(map_[1, :, 3, 5], tokens[1, 3 * 16 + 5])
    assert map_.data_ptr() == tokens.data_ptr()


SCALES = [
    (name, scale)
    for name in RESTORERS
    for scale in ((1, 2, 4) if name == 'rrdb' else (2, 3, 4))
]


@pytest.mark.parametrize(('name', 'scale'), SCALES)
def test_the_scale_is_found(name, scale):
    model = build_restorer(name, scale)
    assert find_scale(model.generator) == find_scale(model.generator, 8) == scale
    assert image_channels(model.generator) == 3


@pytest.mark.parametrize('name', ['edsr', 'rrdb'])
def test_grey_images(name):
    grey = dict(in_channels=1, out_channels=1)
    if name == 'edsr':
        grey.update(rgb_mean=[0.5], rgb_std=[1.0])
    model = build_restorer(name, **grey)
    assert image_channels(model.generator) == 1
    assert find_scale(model.generator) == 2
    assert probe(model, find_units(model))[0].channels == 8


def test_networks_without_batch_norm_are_left_as_they_were(name):
    model = build_restorer(name)
    model.generator.get_submodule(BLOCKS[name])[1].eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    probe(model, find_units(model))
    find_scale(model.generator)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    model.train()  # control
    assert [module.training for module in model.modules()] != modes


def test_subclasses_are_covered():
    model = build_restorer('edsr')

    class MyEDSR(type(model.generator)):
        pass

    model.generator.__class__ = MyEDSR
    assert len(find_units(model)) == 8


class Reordered(nn.Sequential):
    def forward(self, x):
        for block in reversed(list(self.children())):
            x = block(x)
        return x


def test_a_network_that_runs_otherwise_is_refused():
    model = build_restorer('edsr')
    model.generator.body.__class__ = Reordered
    with pytest.raises(ValueError, match='EDSRNet cannot be cut around .*single path'):
        probe(model, find_units(model))


@pytest.mark.usefixtures('mmagic')
def test_other_networks_are_refused_with_those_supported():
    init_default_scope('mmagic')
    model = nn.Module()
    model.generator = MODELS.build(dict(type='SRCNNNet', channels=(3, 4, 4, 3)))
    with pytest.raises(ValueError, match='generator is a SRCNNNet, .*yet') as info:
        find_units(model)
    supported = str(info.value).partition('Supported backbones: ')[2]
    for family in ('EDSRNet', 'MSRResNet', 'RRDBNet', 'RDNNet', 'SwinIRNet', 'ResNet'):
        assert family in supported
