"""Cuts, and which module owns which parameter."""

import dataclasses
from collections import Counter, OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from man_mm.core import CutPartition, StagePartition, UniformPartition, Unit, split
from man_mm.core.partition import branches, outlets

torch.set_num_threads(1)

UNITS = [
    Unit('backbone.maxpool', -1, ('backbone.conv1', 'backbone.maxpool')),
    Unit('backbone.layer1.0', 0),
    Unit('backbone.layer1.1', 0),
    Unit('backbone.layer2.0', 1),
    Unit('backbone.layer10.0', 2),
]


@st.composite
def networks(draw):
    """A chain of units of any kind, any of them frozen, and what no unit covers."""
    children, units, stage = OrderedDict(), [], draw(st.sampled_from([-1, 0]))
    for index in range(draw(st.integers(1, 7))):
        parts = [f'unit{index}_{part}' for part in range(draw(st.integers(1, 2)))]
        for part in parts:
            kind = draw(st.sampled_from(['trained', 'frozen', 'half', 'empty']))
            layer = nn.ReLU() if kind == 'empty' else nn.Linear(2, 2)
            for name, param in layer.named_parameters():
                frozen = kind == 'frozen' or (kind == 'half' and name == 'bias')
                param.requires_grad_(not frozen)
            children[part] = layer
        units.append(Unit(parts[-1], stage, tuple(parts)))
        stage += draw(st.integers(0, 1))
    if draw(st.booleans()):
        children['head'] = nn.Linear(2, 2)
        # Registered first or last: what runs when is the units' to say.
        children.move_to_end('head', last=draw(st.booleans()))
    names = [unit.name for unit in units]
    cuts = [name for name in names[:-1] if draw(st.booleans())]
    return nn.Sequential(children), units, cuts


def check_split(model, units, cuts, modules):
    """Asserts what must hold of every partition, from the definition alone."""
    assert [unit for module in modules for unit in module.units] == list(units)
    assert [module.index for module in modules] == list(range(len(modules)))
    assert [module.is_last for module in modules] == [False] * (len(modules) - 1) + [
        True
    ]
    assert [m.cut for m in modules[:-1]] == [c for c in cuts if c in cut_names(modules)]

    owners = Counter(id(param) for module in modules for param in module.params)
    trainable = [param for param in model.parameters() if param.requires_grad]
    assert owners == Counter({id(param): 1 for param in trainable})

    covered = set()
    for module in modules:
        owned = {id(param) for param in module.params}
        for part in (part for unit in module.units for part in unit.parts):
            params = model.get_submodule(part).parameters()
            own = {id(param) for param in params if param.requires_grad}
            assert own <= owned
            covered |= own
        assert owned or module.is_last, 'a module with nothing to train'
    rest = {id(param) for param in trainable} - covered
    assert rest <= {id(param) for param in modules[-1].params}
    # No more is merged than has to be: each wanted cut with something to train
    # since the cut before it is there.
    assert len(modules) - 1 == count_cuts(model, units, cuts)


def cut_names(modules):
    return {module.cut for module in modules[:-1]}


def count_cuts(model, units, cuts):
    count, learns = 0, False
    for unit in units:
        for part in unit.parts:
            params = model.get_submodule(part).parameters()
            learns |= any(param.requires_grad for param in params)
        if unit.name in cuts and learns:
            count, learns = count + 1, False
    return count


@settings(max_examples=150, deadline=None)
@given(networks())
def test_every_trainable_parameter_has_exactly_one_owner(network):
    model, units, cuts = network
    check_split(model, units, cuts, split(model, units, cuts))


def owned_twice(modules):
    first, *rest, last = modules
    params = (*last.params, first.params[0])
    return [first, *rest, dataclasses.replace(last, params=params)]


def owned_by_nobody(modules):
    *rest, last = modules
    return [*rest, dataclasses.replace(last, params=last.params[:-1])]


def owned_by_another(modules):
    a, b, *rest = modules
    return [
        dataclasses.replace(a, params=b.params),
        dataclasses.replace(b, params=a.params),
        *rest,
    ]


def reordered(modules):
    a, b, *rest = modules
    return [
        dataclasses.replace(a, units=b.units),
        dataclasses.replace(b, units=a.units),
        *rest,
    ]


def merged(modules):
    a, b, *rest = modules
    joint = dataclasses.replace(b, units=a.units + b.units, params=a.params + b.params)
    return [dataclasses.replace(m, index=i) for i, m in enumerate([joint, *rest])]


@pytest.mark.parametrize(
    'spoil', [owned_twice, owned_by_nobody, owned_by_another, reordered, merged]
)
def test_the_check_fails_for_a_wrong_partition(spoil):
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abcd'))
    units, cuts = [Unit(name) for name in 'abc'], ['a', 'b']
    modules = split(model, units, cuts)
    check_split(model, units, cuts, modules)
    with pytest.raises(AssertionError):
        check_split(model, units, cuts, spoil(modules))


def test_modules_name_themselves_and_their_cut():
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abcd'))
    modules = split(model, [Unit(name) for name in 'abc'], ['b'])
    assert [module.name for module in modules] == ['module1', 'module2']
    assert [module.cut for module in modules] == ['b', 'c']


def test_frozen_modules_are_merged_with_the_next():
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abcd'))
    model.a.requires_grad_(False)
    model.c.requires_grad_(False)
    units = [Unit(name) for name in 'abcd']
    modules = split(model, units, ['a', 'b', 'c'])
    assert [[unit.name for unit in module.units] for module in modules] == [
        ['a', 'b'],
        ['c', 'd'],
    ]


@pytest.mark.parametrize('cut', ['z', 'd', 'c'])
def test_split_refuses_cuts_that_no_unit_follows(cut):
    # An unknown name, a submodule that is no unit, and the last unit.
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abcd'))
    units = [Unit(name) for name in 'abc']
    with pytest.raises(ValueError, match=rf"^\['{cut}'\] cannot be cuts"):
        split(model, units, ['a', cut])
    assert len(split(model, units, ['a', 'b'])) == 3


def test_a_parameter_may_be_shared_within_a_module():
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abc'))
    model.b.weight = model.a.weight
    modules = split(model, [Unit(name) for name in 'abc'], ['b'])
    assert sum(p is model.a.weight for m in modules for p in m.params) == 1
    assert any(p is model.a.weight for p in modules[0].params)


def split_with_shared(user, names):
    """Four layers, the cuts after a and b; ``user`` has the weight of a too."""
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'abcd'))
    model.get_submodule(user).weight = model.a.weight
    return split(model, [Unit(name) for name in names], ['a', 'b'])


def test_a_parameter_shared_across_modules_is_an_error():
    with pytest.raises(ValueError, match="by the modules 1 and 2: move the cut 'a'"):
        split_with_shared('b', 'abcd')


@pytest.mark.parametrize('names', ['abcd', 'abc'])
def test_a_parameter_shared_with_the_last_module_is_an_error(names):
    # The second use is in its last unit, or in what no unit covers.
    with pytest.raises(ValueError, match="by the modules 1 and 3: move the cut 'a'"):
        split_with_shared('d', names)


def test_frozen_parameters_may_be_shared():
    model = nn.Sequential(OrderedDict((n, nn.Linear(2, 2)) for n in 'ab'))
    model.b.weight = model.a.weight.requires_grad_(False)
    modules = split(model, [Unit('a'), Unit('b')], ['a'])
    assert [len(module.params) for module in modules] == [1, 1]


def test_a_unit_consists_of_itself_unless_told_otherwise():
    assert Unit('backbone.layer1.0').parts == ('backbone.layer1.0',)
    assert UNITS[0].parts == ('backbone.conv1', 'backbone.maxpool')


def test_stage_partition_cuts_after_every_stage_but_the_last():
    assert StagePartition().cuts(UNITS) == ['backbone.layer1.1', 'backbone.layer2.0']


def test_stage_partition_leaves_the_stem_with_the_first_stage():
    assert StagePartition().cuts(UNITS[:3]) == []


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).map(sorted))
def test_stage_partition_makes_one_module_a_stage(stages):
    units = [Unit(f'{stage}.{i}', stage) for i, stage in enumerate(stages)]
    cuts = StagePartition().cuts(units)
    assert [cut.split('.')[0] for cut in cuts] == [
        str(stage) for stage in sorted(set(stages))[:-1]
    ]


def test_cut_partition_accepts_units_and_whole_stages():
    cuts = ['backbone.maxpool', 'backbone.layer1', 'backbone.layer2.0']
    assert CutPartition(cuts).cuts(UNITS) == [
        'backbone.maxpool',
        'backbone.layer1.1',  # not of layer10, whose name starts alike
        'backbone.layer2.0',
    ]


def test_cut_partition_without_cuts_is_end_to_end():
    assert CutPartition([]).cuts(UNITS) == []
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
    (module,) = split(model, [Unit('a')], [])
    assert module.is_last
    assert list(module.params) == list(model.parameters())


@given(st.sets(st.integers(0, 3)).map(sorted))
def test_cut_partition_keeps_any_valid_cuts(positions):
    cuts = [UNITS[position].name for position in positions]
    assert CutPartition(cuts).cuts(UNITS) == cuts


@pytest.mark.parametrize(
    ('cuts', 'message'),
    [
        (['backbone.layer1.2'], r"'backbone.layer1.2'.*mean 'backbone.layer1.[01]'"),
        (['layer2.0'], r"'layer2.0'.*mean 'backbone.layer2.0'"),
        (['zzz'], r"'zzz'.*mean 'backbone.maxpool'.*5 units run from 'backbone.maxp"),
        (['backbone.layer1.1', 'backbone.layer1.1'], 'different units in the order'),
        (['backbone.layer1', 'backbone.layer1.1'], 'different units in the order'),
        (['backbone.layer2', 'backbone.layer1'], 'different units in the order'),
        (['backbone.layer10'], "ends with 'backbone.layer10', the last unit: drop it"),
        (['backbone'], "ends with 'backbone', the last unit"),
        ([unit.name for unit in UNITS], 'asks for 6 modules.*only 5 units.*most 4'),
    ],
)
def test_wrong_cuts_are_explained(cuts, message):
    with pytest.raises(ValueError, match=rf'^partition\.cuts .*{message}'):
        CutPartition(cuts).cuts(UNITS)


def test_heads_may_read_branches_and_the_cut():
    def chain(read_elsewhere=()):
        layers = [nn.Linear(2, 2) for _ in range(6)]
        units = [
            Unit(str(i), stage, read_elsewhere=i in read_elsewhere)
            for i, stage in enumerate([-1, 0, 0, 1, 1, 2])
        ]
        return split(nn.Sequential(*layers), units, ['4'])

    first, last = chain()
    assert outlets(first) == ['2', '4'] and outlets(last) == ['5']  # ends of stages
    (pair,) = branches(first)
    assert [unit.name for unit in pair] == ['2', '3']
    # Read elsewhere too: each is listed once, in the order in which they run.
    first, last = chain(read_elsewhere=[1, 2, 4, 5])
    assert outlets(first) == ['1', '2', '4'] and outlets(last) == ['5']
    assert [(a.name, b.name) for a, b in branches(first)] == [('1', '2'), ('2', '3')]
    assert branches(last) == []


@pytest.mark.parametrize(
    ('count', 'num_modules', 'sizes'),
    [
        (16, 4, [4, 4, 4, 4]),
        (16, 16, [1] * 16),
        (16, 1, [16]),
        (7, 3, [2, 2, 3]),
        (55, 32, None),
    ],
)
def test_uniform_partition_cuts_into_equal_numbers(count, num_modules, sizes):
    units = [Unit(f'block{i}') for i in range(count)]
    cuts = UniformPartition(num_modules).cuts(units)
    ends = [0, *(int(cut.removeprefix('block')) + 1 for cut in cuts), count]
    found = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    assert len(found) == num_modules and sum(found) == count
    assert max(found) - min(found) <= 1
    assert sizes is None or found == sizes


def test_uniform_partition_with_bad_numbers():
    with pytest.raises(ValueError, match='num_modules must be at least 1, got 0'):
        UniformPartition(0)
    with pytest.raises(ValueError, match='is 4, but the network has only 3'):
        UniformPartition(4).cuts([Unit(f'block{i}') for i in range(3)])


class Embedded(nn.Module):
    """Two layers, and a parameter that is added in front of the first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(2))
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)


@pytest.mark.parametrize('own', [True, False])
def test_a_unit_may_own_parameters_beside_its_parts(own):
    model = Embedded()
    params = ('embedding',) if own else ()
    units = [Unit('first', 0, params=params), Unit('second', 1)]
    modules = split(model, units, ['first'])
    owners = [any(p is model.embedding for p in m.params) for m in modules]
    assert owners == [own, not own]
    assert sum(len(module.params) for module in modules) == 5
