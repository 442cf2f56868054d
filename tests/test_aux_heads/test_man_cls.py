"""MANClsHead trains by the classifier's own loss, for a few percent of its cost."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    build_cifar_classifier,
    build_classifier,
    build_wrapper,
    check_local_losses_fall,
    labelled_images,
    watch_gradients,
)
from mmengine.registry import MODELS, init_default_scope
from torch.utils.flop_counter import FlopCounterMode

from man_mm import MemoryBank
from man_mm.aux_heads.man_cls import MANClsHead, PooledSLM
from man_mm.core.storages import tensor_bytes

SMOOTH = dict(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1))
SOFT = dict(loss=dict(type='CrossEntropyLoss', use_soft=True))
MIXUP = dict(train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))
MULTI_LABEL = dict(
    type='MultiLabelLinearClsHead',
    loss=dict(type='CrossEntropyLoss', use_sigmoid=True),
)
KINDS = {
    'plain': ({}, {}),
    'label-smoothing': (SMOOTH, {}),
    'mixup': (SOFT, MIXUP),
    'label-smoothing-and-mixup': (SMOOTH, MIXUP),
    'stacked': (dict(type='StackedLinearClsHead', mid_channels=[16]), {}),
    'multi-label-and-mixup': (MULTI_LABEL, MIXUP),
}
BLOCKS = ['1.0', '1.2', '2.1', '2.3', '3.1', '3.3', '3.5']
AT_BLOCKS = dict(type='CutPartition', cuts=[f'backbone.layer{x}' for x in BLOCKS])
AT_STAGES = dict(type='StagePartition')


def watch(head):
    """Makes a head note what it is called with, maps detached."""
    calls, forward = [], head.forward

    def noted(maps, targets, bank):
        calls.append(({k: x.detach() for k, x in maps.items()}, targets))
        return forward(maps, targets, bank)

    head.forward = noted
    return calls


def inputs_of(index, depth=18, **aux_head):
    """A head, and the maps and targets that it gets in a training step."""
    model = build_classifier(depth)
    wrapper = build_wrapper(model, aux_head=aux_head)
    head = wrapper.learner.heads[index]
    calls = watch(head)
    model.train_step(labelled_images(), wrapper)
    del head.forward
    return head, *calls[0]


def test_settings_come_from_the_model(depth):
    model = build_classifier(depth, dict(num_classes=7, **SMOOTH))
    heads = build_wrapper(model).learner.heads
    assert all(type(head) is MANClsHead for head in heads)
    assert [head.needs_bank for head in heads] == [False, True, True]
    assert [head.classifier.num_classes for head in heads] == [7] * 3
    assert [head.classifier.in_channels for head in heads] == [256, 320, 384]
    losses = [head.classifier.loss_module for head in heads]
    assert [loss.label_smooth_val for loss in losses] == [0.1] * 3
    assert len({id(loss) for loss in [*losses, model.head.loss_module]}) == 4


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_of_the_heads_learns(kind, depth):
    head, model = KINDS[kind]
    model = build_classifier(depth, head, **model)
    wrapper = build_wrapper(model, update='iteration')
    calls = watch(wrapper.learner.heads[0])
    got = watch_gradients(wrapper, wrapper.learner.heads.named_parameters())
    for _ in range(2):
        logs = model.train_step(labelled_images(), wrapper)
        assert torch.isfinite(logs['loss'])
        losses = wrapper.learner.losses.values()
        assert len(losses) == 3 and all(torch.isfinite(loss) for loss in losses)
    assert not [name for name, has in got if not has]
    (_, samples), *_ = calls
    assert ('gt_score' in samples[0]) == ('mixup' in kind)


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_the_models(kind):
    head, model = KINDS[kind]
    model = build_classifier(18, head, **model)
    aux = build_wrapper(model).learner.heads[0]
    maps = {aux.own: torch.randn(4, 16, 16, 16)}
    np.random.seed(0)  # of the mixing ratio
    samples = model.data_preprocessor(labelled_images(), training=True)['data_samples']
    logits = 10 * torch.randn(4, 10)
    aux.classifier.fc.register_forward_hook(lambda *_: logits)
    loss = aux(maps, samples, None)['loss']

    labels = torch.cat([sample.gt_label for sample in samples])
    target = F.one_hot(labels, 10).float()
    if 'mixup' in kind:
        target = torch.stack([sample.gt_score for sample in samples])
        assert ((target > 0).sum(1) == 2).any()
    if 'label-smoothing' in kind:
        target = 0.9 * target + 0.1 / 10
    if 'multi-label' in kind:
        expected = F.binary_cross_entropy_with_logits(logits, target) * 10
    else:
        expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    if kind not in ('plain', 'stacked'):  # control: hard labels give another loss
        assert not torch.isclose(loss, F.cross_entropy(logits, labels), rtol=1e-3)


def test_local_losses_fall(depth):
    model = build_classifier(depth)
    check_local_losses_fall(model, labelled_images(), steps=6)


def test_seven_cuts_at_blocks():
    model = build_classifier(50)
    wrapper = build_wrapper(model, partition=AT_BLOCKS)
    for _ in range(2):
        model.train_step(labelled_images(), wrapper)
    assert list(wrapper.learner.losses) == [f'module{i}' for i in range(1, 8)]
    assert all(torch.isfinite(loss) for loss in wrapper.learner.losses.values())
    # One vector of each finished stage, however many cuts there are.
    read = [[name[-3:] for name in head.earlier] for head in wrapper.learner.heads]
    first, second = ['1.2'], ['1.2', '2.3']
    assert read == [[], [], first, first, second, second, second]


class TestIsolation:
    """A local loss reaches its own module and head, and nothing else."""

    @pytest.mark.parametrize('index', [0, 1, 2])
    def test_own_module_only(self, index):
        model = build_classifier(18)
        learner = build_wrapper(model).learner
        assert self.reached(model, learner, index) == {index}

    def test_control_without_cuts(self):
        model = build_classifier(18)
        learner = build_wrapper(model).learner
        maps = {}
        for module in learner.modules:
            model.get_submodule(module.cut).register_forward_hook(
                lambda _m, _args, output, cut=module.cut: maps.update({cut: output})
            )
        data = model.data_preprocessor(labelled_images(), training=True)
        model.extract_feat(data['inputs'])
        learner.heads[2](maps, data['data_samples'], MemoryBank())['loss'].backward()
        assert self.with_gradients(learner) == {0, 1, 2}

    def test_maps_of_earlier_modules_get_no_gradient(self):
        head, maps, samples = inputs_of(2)
        maps = {name: map_.requires_grad_() for name, map_ in maps.items()}
        head(maps, samples, MemoryBank())['loss'].backward()
        assert [name for name, map_ in maps.items() if map_.grad is not None] == [
            head.own
        ]

    def reached(self, model, learner, index):
        def backward(loss, module, *_):
            if module.index == index:
                loss.backward()

        data = model.data_preprocessor(labelled_images(), training=True)
        with learner.step(data['data_samples'], backward):
            model(**data, mode='loss')
        return self.with_gradients(learner)

    @staticmethod
    def with_gradients(learner):
        return {
            module.index
            for module in learner.modules
            if any(p.grad is not None for p in learner.params(module))
        }


class TestBank:
    """Pooled maps of earlier modules enter the loss."""

    @pytest.mark.parametrize('use_bank', [True, False])
    def test_the_bank_changes_the_loss(self, use_bank):
        head, maps, samples = inputs_of(2, use_bank=use_bank)
        assert head.needs_bank == use_bank
        before = head(maps, samples, MemoryBank())['loss']
        assert torch.equal(before, head(maps, samples, MemoryBank())['loss'])
        for name, shape in [('layer1', (4, 16, 16, 16)), ('layer2', (4, 32, 8, 8))]:
            changed = {**maps, f'backbone.{name}.1': torch.randn(shape)}
            after = head(changed, samples, MemoryBank())['loss']
            assert torch.equal(before, after) != use_bank

    def test_without_the_bank_own_maps_are_enough(self):
        head, maps, samples = inputs_of(2, use_bank=False)
        assert torch.isfinite(head({head.own: maps[head.own]}, samples, None)['loss'])

    def test_averages_of_earlier_maps_are_enough(self):
        head, maps, samples = inputs_of(2)
        pooled = {
            name: map_ if name == head.own else map_.mean((2, 3), keepdim=True)
            for name, map_ in maps.items()
        }
        assert pooled['backbone.layer1.1'].shape == (4, 16, 1, 1)
        losses = [head(x, samples, MemoryBank())['loss'] for x in (maps, pooled)]
        torch.testing.assert_close(*losses)

    def test_vectors_are_standardised_by_long_term_memory(self):
        model = build_classifier(18)
        wrapper = build_wrapper(model)
        bank, head = wrapper.learner.bank, wrapper.learner.heads[2]
        calls = watch(head)
        model.train_step(labelled_images(), wrapper)
        assert all(bank.statistics(name) is not None for name in head.earlier)
        seen = []
        for linear in head.vectors:
            linear.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
        model.train_step(labelled_images(), wrapper)
        for name, vector in zip(head.earlier, seen, strict=True):
            raw = calls[1][0][name].mean((2, 3))
            assert not torch.allclose(vector, raw)
        other = MemoryBank()
        other.load_state_dict(bank.state_dict())
        seen.clear()
        head(*calls[1], other)
        for name, vector in zip(head.earlier, seen, strict=True):
            mean, variance = other.statistics(name)
            raw = calls[1][0][name].mean((2, 3))
            by_hand = (raw - mean) / (variance + 1e-5).sqrt()
            torch.testing.assert_close(vector, by_hand)


@pytest.mark.parametrize('size', [(56, 56), (7, 9), (2, 2), (1, 1)])
def test_the_slm_has_a_block_at_every_later_scale(size):
    slm = PooledSLM(24, 4, [8, 16, 32], channels=16)
    shapes = []
    for block in slm.blocks:
        block.register_forward_hook(lambda _m, _args, out: shapes.append(out.shape[2:]))
    assert slm(torch.randn(2, 24, *size)).shape == (2, 64)
    halves = [size]
    for _ in range(3):
        halves.append(tuple(-(-x // 2) for x in halves[-1]))
    _, eight, sixteen, thirty_two = halves
    assert shapes == [eight, eight, sixteen, thirty_two, thirty_two]


def test_the_slm_of_the_last_stage_keeps_its_scale():
    slm = PooledSLM(24, 32, [32], channels=16)
    assert slm.pool == 1 and slm.blocks[1][0].stride == (1, 1)


def r50_at_224():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=2048)
    neck = dict(type='GlobalAveragePooling')
    backbone = dict(type='ResNet', depth=50)
    cfg = dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)
    model = MODELS.build(cfg).train()
    return model, model.data_preprocessor(labelled_images(1, 224, 1000), training=True)


def test_cost_at_resnet50():
    """Heads are at most 8 % of the FLOPs, and save less than the map they read."""
    model, data = r50_at_224()
    with FlopCounterMode(display=False) as counter:
        model(**data, mode='loss')['loss'].backward()
    whole = counter.get_total_flops()
    shares = []
    for partition in (AT_STAGES, AT_BLOCKS):
        wrapper = build_wrapper(model, partition=partition)
        calls = [watch(head) for head in wrapper.learner.heads]
        with wrapper.learner.step(data['data_samples'], lambda *_: None):
            model(**data, mode='loss')
        flops = 0
        for head, ((maps, samples),) in zip(wrapper.learner.heads, calls, strict=True):
            del head.forward
            own = maps[head.own].requires_grad_()
            saved = []
            pack = torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.append(x) or x, lambda x: x
            )
            with FlopCounterMode(display=False) as counter, pack:
                loss = head(maps, samples, MemoryBank())['loss']
                more = tensor_bytes([own, saved, head]) - tensor_bytes([own, head])
                assert 0 < more < tensor_bytes(own)
                saved.clear()
                loss.backward()
            flops += counter.get_total_flops()
        shares.append(flops / whole)
    assert shares == pytest.approx([0.018, 0.048], abs=1e-3)
    assert max(shares) < 0.08


def test_a_head_without_num_classes():
    model = build_classifier(18)
    del model.head.num_classes
    with pytest.raises(ValueError, match='a LinearClsHead without num_classes'):
        build_wrapper(model)


VARIANTS = [
    dict(num_blocks=0),
    dict(num_blocks=2),
    dict(fusion='add'),
    dict(norm='BN'),
    dict(mode='faithful'),
    dict(mode='faithful', num_blocks=2, fusion='add'),
]


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_every_variant_reads_the_bank_and_learns(options):
    model = build_cifar_classifier(14)
    partition = dict(type='UniformPartition', num_modules=7)
    wrapper = build_wrapper(
        model,
        optimizer=dict(type='AdamW', lr=3e-3),
        partition=partition,
        aux_head=options,
    )
    batch, first = labelled_images(8, 16, classes=4), None
    for _ in range(8):
        model.train_step(batch, wrapper)
        first = first or dict(wrapper.learner.losses)
    losses = wrapper.learner.losses
    assert [name for name in first if losses[name] > 0.97 * first[name]] == []
    # Of the stem and of each finished stage.
    read = [len(head.earlier) for head in wrapper.learner.heads]
    assert read == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize('depth', [18, 50])
def test_the_faithful_slm_has_blocks_of_the_models_own_kind(depth):
    model = build_classifier(depth)
    aux_head = dict(mode='faithful', num_blocks=2)
    heads = build_wrapper(model, aux_head=aux_head).learner.heads
    blocks = type(model.backbone.layer1[0])
    kinds = [[type(block) for block in head.slm.blocks] for head in heads]
    assert kinds == [[blocks] * 6, [blocks] * 4, [blocks] * 2]
    map_ = torch.randn(2, heads[0].slm.blocks[0].in_channels, 16, 16)
    assert heads[0].slm(map_).shape == (2, model.head.in_channels)
    shared = {id(p) for p in model.parameters()}
    assert not shared & {id(p) for p in heads.parameters()}


def test_adding_needs_no_wider_classifier():
    options = [dict(fusion='add'), dict(fusion='concatenate')]
    heads = [
        build_wrapper(build_classifier(18), aux_head=o).learner.heads for o in options
    ]
    widths = [[head.classifier.in_channels for head in group] for group in heads]
    assert widths == [[256] * 3, [256, 320, 384]]
