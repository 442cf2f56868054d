"""Modules that run on slices of the batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    LABELS,
    WIDTH,
    EntryHead,
    PooledHead,
    all_params,
    build,
    count_hooks,
)
from torch import nn

from man_mm.core import LocalLearner, MemoryBank, StagePartition, Unit, split
from man_mm.core.micro_batches import slice_batch, slices_of
from man_mm.measure.memory import measure_memory

IMAGES = torch.randn(4, 2, 8, 8, dtype=torch.float64)


def train(learner, steps=3, images=IMAGES, labels=LABELS):
    optimizer = torch.optim.SGD(all_params(learner), 0.1, momentum=0.9)

    def backward(loss, module, complete):
        loss.backward()
        if complete:
            update()

    def update():
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        with learner.step(labels, backward):
            loss = F.cross_entropy(learner.model(images), labels)
        loss.backward()
        update()
    return learner


def build_frozen(size, cuts=None, bank=None, depth=3, maps=1):
    """In float64, with frozen batch norms: slices are exact."""
    learner = build(depth, cuts, bank)
    if maps > 1:
        learner.heads = nn.ModuleList([PooledHead(maps)])
    learner.micro_batch_size = size
    learner.model.double().eval()
    learner.heads.double()
    return learner


def check_equal(one, other):
    for a, b in zip(all_params(one), all_params(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for name, loss in one.losses.items():
        torch.testing.assert_close(loss, other.losses[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 9])
def test_slices_equal_the_whole_batch(size, bank):
    whole, sliced = (train(build_frozen(s, bank=bank and bank())) for s in (None, size))
    check_equal(whole, sliced)
    if bank:
        for a, b in zip(whole.bank.moments(), sliced.bank.moments(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('cut', ['stage1', 'stage2'])
def test_modules_of_several_stages(cut):
    maps = int(cut[-1])
    check_equal(*(train(build_frozen(s, [cut], depth=4, maps=maps)) for s in (None, 2)))


def test_a_slice_without_its_weight_is_found():
    class Unweighted(LocalLearner):
        def _train(self, module, own, backward, images=None, count=0):
            def unweighted(loss, module, complete):
                backward(loss * count / (images.stop - images.start), module, complete)

            return super()._train(
                module, own, unweighted if images else backward, images, count
            )

    sliced = build_frozen(1)
    sliced.__class__ = Unweighted
    with pytest.raises(AssertionError):
        check_equal(train(build_frozen(None)), train(sliced))


def test_batch_norm_in_training_mode_sees_slices():
    learners = []
    for size in (None, 1):
        learner = build_frozen(size)
        learner.model.train()
        learners.append(train(learner, steps=1))
    with pytest.raises(AssertionError):
        check_equal(*learners)
    updates = [m.num_batches_tracked.item() for m in norms(learners[1].model)]
    assert updates == [4, 4, 4]  # the last module's once a slice, too


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


class Neck(nn.Module):
    """Reads the ends of all stages, as detectors do."""

    def __init__(self, stages):
        super().__init__()
        torch.manual_seed(2)
        self.stages = stages
        self.laterals = nn.ModuleList(nn.Conv2d(4, 3, 1) for _ in range(3))

    def forward(self, x):
        total = 0
        for stage, lateral in zip(
            (self.stages.stage1, self.stages.stage2, self.stages.stage3),
            self.laterals,
            strict=True,
        ):
            x = stage(x)
            total = total + lateral(x).mean((2, 3))
        return total


@pytest.mark.parametrize('cut', ['stage1', 'stage2'])
def test_networks_that_read_the_ends_of_stages(cut):
    learners = []
    for size in (None, 1):
        heads = build_frozen(size, [cut], maps=int(cut[-1])).heads
        neck = Neck(build_frozen(None).model).double()
        units = [Unit(f'stages.stage{i + 1}', i) for i in range(3)]
        modules = split(neck, units, [f'stages.{cut}'])
        learners.append(
            train(LocalLearner(neck, modules, heads, micro_batch_size=size))
        )
    check_equal(*learners)


def test_memory_grows_by_the_boundaries_only():
    def growth(size):
        peaks = []
        for count in (8, 16):
            learner = build_frozen(size)
            batch = IMAGES.repeat(count // 4, 1, 1, 1), LABELS.repeat(count // 4)
            step = measure_memory(lambda: train(learner, 2, *batch))  # noqa: B023
            peaks.append(step.peak)
        return peaks[1] - peaks[0]

    map_ = 8 * 4 * 8 * 8 * 8  # eight images more, 4 channels, float64
    # An input and an output; at the end, one recomputed output and two gradients.
    assert growth(2) < 4 * map_ < growth(None)


def test_nothing_is_left_on_the_model():
    learner = train(build_frozen(2))
    assert count_hooks(learner.model) == 0
    assert not any('forward' in vars(m) for m in learner.model.modules())


def test_a_size_of_zero_is_refused():
    learner = build(2)
    with pytest.raises(ValueError, match='at least 1 image, got 0'):
        LocalLearner(learner.model, learner.modules, learner.heads, micro_batch_size=0)


@given(st.integers(1, 40), st.integers(1, 50))
def test_slices_cover_the_batch_in_order(count, size):
    slices = slices_of(count, size)
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    assert all(0 < part.stop - part.start <= size for part in slices)


def test_targets_are_sliced():
    part = slice(1, 3)
    assert slice_batch(None, part, 3) is None
    assert slice_batch(['a', 'b', 'c'], part, 3) == ['b', 'c']
    targets = {'label': torch.arange(3), 'name': ['a', 'b', 'c']}
    sliced = slice_batch(targets, part, 3)
    assert sliced['label'].tolist() == [1, 2] and sliced['name'] == ['b', 'c']
    for wrong in (['a', 'b'], 3):
        with pytest.raises(ValueError, match='one entry for each of the 3 images'):
            slice_batch(wrong, part, 3)


class Restorer(nn.Module):
    """Units of several parts, one of which writes in place and runs again at the end.

    All blocks are read behind the body too, as is what is in front of it.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.front, self.act = conv(2), nn.LeakyReLU(0.2, inplace=True)
        self.stem, self.tail = conv(WIDTH), conv(5 * WIDTH)
        self.body = nn.ModuleList(conv(WIDTH) for _ in range(4))
        self.classifier = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x):
        maps = [self.front(x)]
        x = self.act(self.stem(maps[0]))
        for block in self.body:
            maps.append(x := block(x))
        x = self.act(self.tail(torch.cat(maps, 1)))
        return self.classifier(x.mean((2, 3)))


def conv(channels):
    return nn.Conv2d(channels, WIDTH, 3, padding=1)


def build_restorer(size, bank=None, per_module=2):
    model = Restorer()
    units = [Unit(f'body.{i}', i // per_module, read_elsewhere=True) for i in range(4)]
    units[0] = dataclasses.replace(units[0], parts=('stem', 'act', 'body.0'))
    modules = split(model, units, StagePartition().cuts(units))
    torch.manual_seed(1)
    heads = [
        (PooledHead(per_module) if bank is None else EntryHead()).double()
        for _ in modules[1:]
    ]
    return LocalLearner(model, modules, heads, bank, micro_batch_size=size)


@pytest.mark.parametrize('per_module', [1, 2])
@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('size', [1, 3])
def test_networks_with_a_global_skip(size, bank, per_module):
    whole, sliced = (
        train(build_restorer(s, bank and bank(), per_module)) for s in (None, size)
    )
    check_equal(whole, sliced)
    before = build_restorer(None).model.front.weight
    assert not torch.equal(before, whole.model.front.weight)
    assert count_hooks(sliced.model) == 0
    assert not any('forward' in vars(m) for m in sliced.model.modules())


def test_a_global_skip_whose_slices_do_not_add_up_is_found():
    class Overwriting(LocalLearner):
        def _train(self, *args):
            for x in self.entered:
                x.grad = None  # of the slices before
            return super()._train(*args)

        def _enter(self, submodule, args):
            args = super()._enter(submodule, args)
            self.entered = [args[0]]
            return args

    learners = [build_restorer(size) for size in (None, 1)]
    learners[1].__class__ = Overwriting
    with pytest.raises(AssertionError):
        check_equal(*map(train, learners))


def test_units_that_take_more_than_a_map_are_refused():
    learner = build(2)
    units = [
        dataclasses.replace(module.units[0], as_map=lambda tokens, args: tokens)
        for module in learner.modules
    ]
    modules = split(learner.model, units, [units[0].name])
    LocalLearner(learner.model, modules, learner.heads)
    with pytest.raises(ValueError, match='micro_batch_size .* takes more: remove'):
        LocalLearner(learner.model, modules, learner.heads, micro_batch_size=1)
