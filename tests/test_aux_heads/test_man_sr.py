"""MANSRHead restores the whole target, from its module's map and shallow features."""

import pytest
import torch
from conftest import (
    RESTORERS,
    build_restorer,
    build_wrapper,
    check_local_losses_fall,
    image_pairs,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from man_mm import MemoryBank
from man_mm.aux_heads import MANSRHead

torch.set_num_threads(1)

SCALES = [
    (name, scale)
    for name in RESTORERS
    for scale in ((2, 4) if name == 'rrdb' else (2, 3, 4))
]


@pytest.fixture(params=RESTORERS)
def name(request):
    return request.param


class Watched(nn.Module):
    """A pixel loss that notes what it compares; copies of it share the notes."""

    seen = []

    def forward(self, outputs, target):
        self.seen.append((outputs.detach(), target))
        return (outputs - target).square().mean()


@pytest.fixture
def watched():
    Watched.seen.clear()
    return Watched


class Recorder(dict):
    """Maps that remember which of them were looked up."""

    def __init__(self, maps):
        super().__init__(maps)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def inputs_of(model, index=1, **aux_head):
    """A head, and the maps and targets that it gets in a training step."""
    wrapper = build_wrapper(model, aux_head=aux_head)
    head, calls = wrapper.learner.heads[index], []
    forward = head.forward

    def noted(maps, targets, bank):
        maps = Recorder(maps)
        loss = forward(maps, targets, bank)
        calls.append(({k: x.detach() for k, x in maps.items()}, targets, maps.names))
        return loss

    head.forward = noted
    model.train_step(image_pairs(), wrapper)
    del head.forward
    return head, *calls[0]


@pytest.mark.parametrize('use_bank', [True, False])
def test_it_is_chosen_and_reads_what_it_says(name, use_bank):
    model = build_restorer(name)
    learner = build_wrapper(model, aux_head=dict(use_bank=use_bank)).learner
    assert len(learner.heads) == 3
    for module, head in zip(learner.modules, learner.heads, strict=False):
        assert type(head) is MANSRHead
        assert (head.own, head.entry) == (module.cut, 'entry')
        assert head.needs_bank == use_bank
        assert head.reads == ({'entry'} if use_bank else set())
    head, maps, _, looked_up = inputs_of(model, use_bank=use_bank)
    assert looked_up == {head.own, *head.reads}
    assert ('entry' in maps) == use_bank


def test_it_keeps_nothing_of_the_model(name):
    model = build_restorer(name)
    heads = build_wrapper(model).learner.heads
    assert not set(model.modules()) & set(heads.modules())
    params = list(heads.parameters())
    storages = {p.data_ptr() for p in [*model.parameters(), *params]}
    assert len(storages) == len(list(model.parameters())) + len(params)


@pytest.mark.parametrize(('name', 'scale'), SCALES)
def test_the_loss_is_the_models_against_the_whole_target(name, scale, watched):
    model = build_restorer(name, scale)
    model.pixel_loss = watched()
    wrapper = build_wrapper(model)
    batch = image_pairs(side=8, scale=scale)
    model.train_step(batch, wrapper)
    *heads, _ = seen = watched.seen
    assert len(heads) == len(wrapper.learner.heads) == 3
    target = torch.stack([sample.gt_img for sample in batch['data_samples']]) / 255
    for outputs, other in seen:
        assert outputs.shape == other.shape == (2, 3, 8 * scale, 8 * scale)
        torch.testing.assert_close(other, target)
    losses = [(outputs - target).square().mean() for outputs, target in heads]
    torch.testing.assert_close(list(wrapper.learner.losses.values()), losses)


def test_images_that_are_not_square(name, watched):
    model = build_restorer(name)
    model.pixel_loss = watched()
    learner = build_wrapper(model).learner
    samples = type(image_pairs()['data_samples'][0])(gt_img=torch.rand(1, 3, 32, 48))
    with learner.step(samples):
        model(torch.rand(1, 3, 16, 24), samples, mode='loss')
    assert [outputs.shape for outputs, _ in watched.seen] == [(1, 3, 32, 48)] * 4


def test_images_that_swinir_pads(watched):
    model = build_restorer('swinir')
    model.pixel_loss = watched()
    model.train_step(image_pairs(side=18), build_wrapper(model))
    assert [outputs.shape for outputs, _ in watched.seen] == [(2, 3, 36, 36)] * 4


def test_local_losses_fall(name):
    check_local_losses_fall(build_restorer(name), image_pairs(), steps=20)


@pytest.mark.parametrize('name', ['edsr', 'swinir'])
def test_it_starts_at_the_mean_of_the_network(name, watched):
    mean = torch.tensor([0.1, 0.5, 0.7]).view(1, 3, 1, 1)
    for value in (mean, 0 * mean):
        model = build_restorer(name)
        model.pixel_loss = watched()
        head = build_wrapper(model).learner.heads[0]
        model.generator.mean = value
        torch.manual_seed(3)
        other = build_wrapper(model).learner.heads[0]
        maps = {head.own: torch.zeros(2, *own_shape(name))}
        maps['entry'] = torch.zeros_like(maps[head.own])
        _, samples = preprocess(model)
        other(maps, samples, MemoryBank())
    (with_mean, _), (without, _) = watched.seen
    assert with_mean.shape == (2, 3, 32, 32)
    torch.testing.assert_close(with_mean - without, mean.expand_as(without))


def own_shape(name):
    return (12 if name == 'swinir' else 8), 16, 16


def preprocess(model):
    data = model.data_preprocessor(image_pairs(), training=True)
    return data['inputs'], data['data_samples']


@pytest.mark.parametrize('use_bank', [True, False])
def test_the_shallow_features_change_the_loss(name, use_bank):
    head, maps, samples, _ = inputs_of(build_restorer(name), use_bank=use_bank)
    bank = MemoryBank() if use_bank else None
    before = head(maps, samples, bank)['loss']
    assert torch.equal(before, head(maps, samples, bank)['loss'])
    entry = maps.get('entry', maps[head.own])
    after = head({**maps, 'entry': torch.randn_like(entry)}, samples, bank)['loss']
    assert torch.equal(before, after) != use_bank
    if not use_bank:
        head({head.own: maps[head.own]}, samples, None)


def test_inputs_are_not_changed(name):
    head, maps, samples, _ = inputs_of(build_restorer(name))
    copies = {key: map_.clone() for key, map_ in maps.items()}
    target = samples.gt_img.clone()
    head(maps, samples, MemoryBank())['loss'].backward()
    assert all(torch.equal(maps[key], copies[key]) for key in maps)
    assert torch.equal(samples.gt_img, target)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(num_blocks=0),
        dict(num_blocks=3, channels=5),
        dict(use_bank=False, channels=1),
    ],
)
def test_every_parameter_learns(options):
    head, maps, samples, _ = inputs_of(build_restorer('edsr'), **options)
    maps = {key: map_.requires_grad_() for key, map_ in maps.items()}
    head(maps, samples, MemoryBank())['loss'].backward()
    assert not [n for n, p in head.named_parameters() if not p.grad.count_nonzero()]
    assert maps[head.own].grad.count_nonzero()


def test_options_change_the_cost():
    def flops(**options):
        head, maps, samples, _ = inputs_of(build_restorer('edsr'), **options)
        with FlopCounterMode(display=False) as counter:
            head(maps, samples, MemoryBank())
        return counter.get_total_flops()

    default = flops()
    assert default == flops(num_blocks=1, use_bank=True)
    assert flops(num_blocks=0) < default < flops(num_blocks=2)
    assert flops(channels=1) < default < flops(channels=16)
    assert flops(use_bank=False) < default


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(channels=0), 'aux_head.channels must be at least 1.* got 0'),
        (dict(channels=-1), 'aux_head.channels must be at least 1.* got -1'),
        (dict(num_blocks=-1), 'aux_head.num_blocks at least 0, got .*-1'),
        (dict(mode='light'), r"\['mode'\].*BaseEditModel, MANSRHead takes \['chann"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_wrapper(build_restorer('edsr'), aux_head=options)


def test_a_model_without_a_pixel_loss_has_no_head():
    model = build_restorer('edsr')
    model.pixel_loss = None
    with pytest.raises(ValueError, match='for BaseEditModel; .* with a pixel_loss'):
        build_wrapper(model)
