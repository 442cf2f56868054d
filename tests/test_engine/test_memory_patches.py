"""Options that save memory inside modules, on small real models."""

import copy

import pytest
import torch
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
)
from mmengine.logging import MMLogger
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.registry import init_default_scope

from man_mm.engine import loss_patches
from man_mm.engine.memory_patches import submodules_of
from man_mm.measure.memory import measure_memory

PLAIN = dict(efficient_conv_bn_eval=False)


def detector(frozen=-1):
    return build_detector(detector_config('retinanet', 18, frozen))


def trained(model, batches, clip_grad=None, accumulate=1, **options):
    """The weights of a copy of a model after a few steps."""
    model = copy.deepcopy(model)
    wrapper = build_wrapper(model, clip_grad=clip_grad, **options)
    wrapper._accumulative_counts = accumulate
    wrapper.initialize_count_status(model, 0, len(batches))
    for batch in batches:
        model.train_step(copy.deepcopy(batch), wrapper)
    assert not any(p.grad is not None for p in model.parameters())
    return list(model.parameters()) + list(wrapper.learner.heads.parameters())


def same(a, b, **tolerance):
    if not tolerance:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def model():
    return detector()


@pytest.fixture(scope='module')
def batches():
    def shifted(batch, pixels):
        images = [image.roll(pixels, -1) for image in batch['inputs']]
        return dict(batch, inputs=images)

    return [shifted(batch_of(), 7 * i) for i in range(4)]


@pytest.mark.parametrize('accumulate', [1, 2])
def test_updates_of_parameters_and_of_modules_are_equal(model, batches, accumulate):
    by_module = trained(model, batches, accumulate=accumulate)
    assert same(
        by_module, trained(model, batches, accumulate=accumulate, update='parameter')
    )
    others = trained(model, batches[::-1], accumulate=accumulate)
    assert not same(by_module, others)  # control


def test_updates_of_parameters_free_gradients_at_once():
    # No weights that several levels share, whose gradients come together at the end.
    model, batch = build_classifier(18), labelled_images(4, 32)
    reports = []
    for update in ('module', 'parameter'):
        other = copy.deepcopy(model)
        wrapper = build_wrapper(other, update=update)
        other.train_step(batch, wrapper)
        step = lambda: other.train_step(batch, wrapper)  # noqa: B023, E731
        reports.append(measure_memory(step, learner=wrapper.learner))
    by_module, by_parameter = (report.kinds['gradients'] for report in reports)
    largest = max(param.nbytes for param in model.parameters())
    assert by_parameter < 1.1 * largest < by_module
    assert reports[1].peak < reports[0].peak


def test_recomputed_layers_train_equally(model, batches):
    plain = trained(model, batches)
    for names in (['backbone.layer4'], ['backbone.layer2.1', 'neck'], ['backbone']):
        assert same(plain, trained(model, batches, recompute=names))


def test_recomputing_takes_less_memory():
    model, batch = build_classifier(18), labelled_images(4, 128)

    def peak(**options):
        other = copy.deepcopy(model)
        cuts = dict(type='CutPartition', cuts=['backbone.maxpool'])
        wrapper = build_wrapper(other, partition=cuts, **options)
        other.train_step(batch, wrapper)
        return measure_memory(lambda: other.train_step(batch, wrapper)).peak

    assert peak(recompute=['backbone.layer1', 'backbone.layer2']) < 0.9 * peak()


def test_a_list_stands_for_its_items():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert submodules_of(model, 'layers') == [*model.layers]
    assert submodules_of(model, 'layers.1') == [model.layers[1]]


def test_an_unknown_name_to_recompute(model):
    with pytest.raises(ValueError, match="recompute has 'backbone.layer7'"):
        build_wrapper(model, recompute=['backbone.layer7'])


def test_folded_norms_train_equally_up_to_rounding(model, batches):
    plain, folded = (trained(model, batches[:1], **options) for options in (PLAIN, {}))
    assert not same(plain, folded)
    flat = [torch.cat([p.detach().flatten() for p in w]) for w in (plain, folded)]
    update = flat[0] - torch.cat(
        [p.detach().flatten() for p in (*model.parameters(), *heads_of(model))]
    )
    assert (flat[0] - flat[1]).norm() < 1e-3 * update.norm()


def heads_of(model):
    return build_wrapper(copy.deepcopy(model)).learner.heads.parameters()


def test_norms_that_train_are_left_alone():
    model, batch = build_classifier(18), labelled_images()
    assert same(trained(model, [batch]), trained(model, [batch], **PLAIN))


def test_a_backbone_that_was_traced_as_a_whole_is_refused(model):
    traced = copy.deepcopy(model)
    wrapper = build_wrapper(traced)
    turn_on_efficient_conv_bn_eval(traced, 'backbone')
    with pytest.raises(ValueError, match='remove the key efficient_conv_bn_eval'):
        wrapper.initialize_count_status(traced, 0, 1)


def test_losses_are_recomputed_bit_for_bit(model, batches, monkeypatch):
    with_patches = trained(model, batches)
    monkeypatch.setattr(loss_patches, 'ELEMENTWISE_LOSSES', ())
    assert same(with_patches, trained(model, batches))


class TestMicroBatches:
    def classifier(self):
        # In float64, with frozen norms, so that micro-batches are exact.
        model = build_classifier(18).double()
        model.data_preprocessor.float = lambda: None
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, m=module: m
        return model

    def step(self, size):
        model = self.classifier()
        wrapper = build_wrapper(model, micro_batch_size=size)
        with wrapper.optim_context(model):
            data = model.data_preprocessor(labelled_images(), True)
            data['inputs'] = data['inputs'].double()
            losses = model(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        wrapper.update_params(loss)
        return list(model.parameters()) + list(wrapper.learner.heads.parameters())

    @pytest.mark.parametrize('size', [1, 3])
    def test_a_classifier_trains_equally(self, size):
        whole, sliced = self.step(None), self.step(size)
        assert same(whole, sliced, rtol=1e-9, atol=1e-12)

    def test_norms_that_train_are_warned_of(self, monkeypatch):
        warnings = []
        logger = MMLogger.get_current_instance()
        monkeypatch.setattr(logger, 'warning', warnings.append)
        model = build_classifier(18)
        for size in (None, 2):
            wrapper = build_wrapper(model, micro_batch_size=size)
            wrapper.initialize_count_status(model, 0, 1)
        assert len(warnings) == 1 and '20 batch norms' in warnings[0]

    @pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
    def test_detectors_train(self, kind):
        model = build_detector(detector_config(kind, 18))
        wrapper = build_wrapper(model, micro_batch_size=1)
        params = [wrapper.learner.params(m) for m in wrapper.learner.modules]
        before = copy.deepcopy(params)
        losses = model.train_step(batch_of(), wrapper)
        assert all(torch.isfinite(torch.as_tensor(v)).all() for v in losses.values())
        assert not any(same(a, b) for a, b in zip(before, params, strict=True))
