"""The contracts of local learning, on real detectors; each has a control that fails."""

import copy

import pytest
import torch
from conftest import batch_of, build_detector, build_wrapper, detector_config
from mmengine.optim import build_optim_wrapper
from networks import LeakyCuts
from torch.utils.flop_counter import FlopCounterMode

from man_mm.core.storages import tensor_bytes
from man_mm.measure.memory import measure_memory


def train(model, wrapper, steps=2, seed=1):
    torch.manual_seed(seed)
    for _ in range(steps):
        logs = model.train_step(batch_of(), wrapper)
    return logs


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def values(model):
    return list(model.state_dict().values())


def gradients(model, wrapper, trained):
    """Trains only some modules for a step; returns what got a gradient, by module."""
    learner = wrapper.learner
    got = {}

    def backward(loss, module, complete):
        if module.index in trained:
            loss.backward()

    data = model.data_preprocessor(batch_of(), training=True)
    with learner.step(data['data_samples'], backward):
        losses = model(**data, mode='loss')
    if len(learner.modules) - 1 in trained:
        model.parse_losses(losses)[0].backward()
    for module in learner.modules:
        got[module.index] = sum(p.grad is not None for p in learner.params(module))
    return got


class TestIsolation:
    """Contract 1: a local loss reaches exactly its own module and head."""

    def test_each_loss_trains_its_own_module(self, kind, depth):
        model = build_detector(detector_config(kind, depth))
        for index in range(4):
            wrapper = build_wrapper(model)
            got = gradients(model, wrapper, trained={index})
            expected = {i: 0 for i in range(4)}
            expected[index] = len(
                wrapper.learner.params(wrapper.learner.modules[index])
            )
            assert got == expected
            model.zero_grad()

    def test_control_a_cut_that_does_not_detach(self, kind, depth, monkeypatch):
        monkeypatch.setattr('man_mm.core.learner.CutHooks', LeakyCuts)
        model = build_detector(detector_config(kind, depth))
        got = gradients(model, build_wrapper(model), trained={3})
        assert got[0] and got[1] and got[2]

    def test_boundaries_have_no_graph(self, kind):
        model = build_detector(detector_config(kind, 18))
        wrapper = build_wrapper(model)
        seen = []
        for module in wrapper.learner.modules[1:]:
            first = model.get_submodule(module.units[0].name)
            first.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        model.train_step(batch_of(), wrapper)
        assert len(seen) == 3
        assert all(x.grad_fn is None and not x.requires_grad for x in seen)


class TestOracles:
    """Contract 2: equal to what one would write by hand."""

    @pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
    def test_one_module_is_plain_training(self, kind, depth, optimizer):
        cfg = detector_config(kind, depth)
        optimizer = dict(type=optimizer, lr=1e-3)
        plain, local = build_detector(cfg), build_detector(cfg)
        stock = build_optim_wrapper(
            plain, dict(type='OptimWrapper', optimizer=dict(optimizer))
        )
        wrapper = build_wrapper(
            local, optimizer=optimizer, partition=dict(type='CutPartition', cuts=[])
        )
        assert len(wrapper.learner.modules) == 1
        assert train(plain, stock)['loss'] == train(local, wrapper)['loss']
        assert same(values(plain), values(local))
        train(local, wrapper, steps=1, seed=2)  # control
        assert not same(values(plain), values(local))

    @pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
    @pytest.mark.parametrize('clip_grad', [None, dict(max_norm=0.1)])
    def test_step_per_module_is_one_joint_step(self, kind, optimizer, clip_grad):
        cfg = detector_config(kind, 18)
        optimizer = dict(type=optimizer, lr=1e-3, weight_decay=0.01)
        models = [build_detector(cfg) for _ in range(3)]
        wrappers = [
            build_wrapper(
                model, optimizer=optimizer, clip_grad=clip_grad, update=update
            )
            for model, update in zip(
                models, ['module', 'iteration', 'iteration'], strict=True
            )
        ]
        train(models[0], wrappers[0], 3)
        train(models[1], wrappers[1], 3)
        train(models[2], wrappers[2], 2)  # control
        assert same(values(models[0]), values(models[1]))
        assert same(
            values(wrappers[0].learner.heads), values(wrappers[1].learner.heads)
        )
        assert not same(values(models[0]), values(models[2]))

    @pytest.mark.parametrize('update', ['module', 'iteration'])
    def test_accumulation_equals_a_loop_by_hand(self, update):
        cfg = detector_config('retinanet', 18)
        hooked, by_hand = build_detector(cfg), build_detector(cfg)
        wrapper = build_wrapper(hooked, update=update)
        wrapper._accumulative_counts = 2
        other = build_wrapper(by_hand)
        batches = [batch_of(1), batch_of(2), batch_of(3), batch_of(1)]
        for batch in batches:
            hooked.train_step(copy.deepcopy(batch), wrapper)
        optimizer = other.optimizer
        for index, batch in enumerate(batches):
            data = by_hand.data_preprocessor(copy.deepcopy(batch), training=True)
            backward = lambda loss, *_: (loss / 2).backward()  # noqa: E731
            with other.learner.step(data['data_samples'], backward):
                losses = by_hand(**data, mode='loss')
            (by_hand.parse_losses(losses)[0] / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert not same(values(hooked), values(by_hand)) or index == 0
        assert same(values(hooked), values(by_hand))


class TestMemory:
    """Contract 3: the peak ignores later modules, and nothing survives a step."""

    @staticmethod
    def peak(extra_blocks, local):
        cfg = detector_config('retinanet', 50)
        # A thin neck and head: the first module sets the peak.
        cfg.model.neck.out_channels = 16
        cfg.model.bbox_head.update(in_channels=16, feat_channels=16, num_classes=1)
        model = build_detector(cfg)
        stage = model.backbone.layer3
        cuts = ['backbone.layer1', 'backbone.layer2', 'backbone.layer3.2']
        for index in range(len(stage), len(stage) + extra_blocks):
            stage.append(copy.deepcopy(stage[-1]))
            cuts.append(f'backbone.layer3.{index}')
        partition = dict(type='CutPartition', cuts=cuts if local else [])
        wrapper = build_wrapper(model, partition=partition)
        batch = batch_of(2, 128, 128)
        for sample in batch['data_samples']:
            sample.gt_instances.labels.zero_()
        model.train_step(batch, wrapper)
        return measure_memory(lambda: model.train_step(batch, wrapper)).peak

    def test_peak_does_not_grow_with_later_modules(self):
        assert self.peak(6, local=True) == self.peak(2, local=True)
        assert self.peak(6, local=False) > 1.05 * self.peak(2, local=False)  # control

    @pytest.mark.parametrize('bank', [True, False])
    def test_nothing_survives_a_step(self, kind, bank):
        def kept(model, wrapper):
            batch = batch_of()
            model.train_step(batch, wrapper)
            wrapper.message_hub._log_scalars = {}

            def step():
                model.train_step(batch, wrapper)
                for history in wrapper.message_hub.log_scalars.values():
                    assert history.data  # as a logger reads it

            return measure_memory(step).end

        cfg = detector_config(kind, 18)
        stock = build_optim_wrapper(
            plain := build_detector(cfg),
            dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        )
        model = build_detector(cfg)
        wrapper = build_wrapper(model, bank=bank, aux_head=dict(use_bank=bank))
        learner = wrapper.learner
        # mmdet's own heads keep their last target assignment.
        more = kept(model, wrapper) - kept(plain, stock)
        moments = learner.bank.moments() if bank else []
        known = tensor_bytes([learner.losses, moments])
        assert more <= known
        assert learner.targets is None
        assert all(p.grad is None for p in model.parameters())
        if bank:  # control: the maps stay
            assert not learner.bank
            learner.bank.clear = lambda: None
            assert kept(model, wrapper) - kept(plain, stock) > known


class TestPlainModel:
    """Contract 4: the model stays the plain model."""

    def test_state_dict_and_predictions(self, kind, depth):
        cfg = detector_config(kind, depth)
        model, stock = build_detector(cfg), build_detector(cfg)
        keys = list(stock.state_dict())
        train(model, build_wrapper(model))
        assert list(model.state_dict()) == keys
        assert not any(
            m._forward_hooks or m._forward_pre_hooks for m in model.modules()
        )
        stock.load_state_dict(model.state_dict(), strict=True)
        ours, flops = self.predict(model)
        theirs, stock_flops = self.predict(stock)
        assert len(ours) and same(ours, theirs) and flops == stock_flops > 0
        stock.backbone.conv1.weight.data *= 2  # control
        changed, _ = self.predict(stock)
        assert len(changed) != len(ours) or not same(ours, changed)

    @staticmethod
    def predict(model):
        model.eval()
        with FlopCounterMode(display=False) as counter:
            results = model.test_step(batch_of())
        found = [sample.pred_instances for sample in results]
        assert sum(len(instances) for instances in found)
        return [
            x for i in found for x in (i.bboxes, i.scores)
        ], counter.get_total_flops()

    def test_initial_weights_do_not_depend_on_local_learning(self, kind):
        from mmengine.registry import MODELS

        cfg = detector_config(kind, 18)
        torch.manual_seed(0)
        plain = MODELS.build(cfg.model)
        plain.init_weights()
        torch.manual_seed(0)
        local = MODELS.build(cfg.model)
        build_wrapper(local)
        local.init_weights()
        assert same(values(plain), values(local))


class TestBankIsUnchanged:
    """Contract 7: later modules leave the maps in the bank alone."""

    @pytest.mark.parametrize('inplace', [False, True])
    def test_maps_are_bit_equal_after_later_modules(self, kind, depth, inplace):
        model = build_detector(detector_config(kind, depth))
        wrapper = build_wrapper(model)
        bank, stored, copies = wrapper.learner.bank, {}, {}
        store = bank.store

        def keep(name, map_, average):
            store(name, map_, average)
            stored[name], copies[name] = map_.detach(), map_.clone()

        bank.store = keep
        if inplace:  # control: the first operation of stage 3 writes to its input
            model.backbone.layer3[0].register_forward_pre_hook(
                lambda _m, args: args[0].mul_(2)
            )
        if inplace:
            with pytest.raises(RuntimeError, match='changed in place'):
                model.train_step(batch_of(), wrapper)
        else:
            model.train_step(batch_of(), wrapper)
            assert copies
            assert all(torch.equal(stored[name], copies[name]) for name in copies)
