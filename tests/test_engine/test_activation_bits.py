"""``activation_bits`` on real models."""

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

from man_mm.core import compressed_activations
from man_mm.core.patches import patched
from man_mm.engine import memory_patches
from man_mm.engine.memory_patches import compression_patches
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)
SGD = dict(type='SGD', lr=1.0)


def classifier():
    return build_classifier(18)


def retinanet():
    return build_detector(detector_config('retinanet', 18, frozen=1))


MODELS = {
    classifier: lambda: labelled_images(12, 96),
    retinanet: lambda: batch_of(2, 192, 192),
}


def train(build, bits, amp=None, **options):
    """How a step changes the parameters, and its peak."""
    model, batch = build(), MODELS[build]()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    wrapper = build_wrapper(
        model, optimizer=SGD, amp=amp, activation_bits=bits, **options
    )
    torch.manual_seed(5)
    report = measure_memory(lambda: model.train_step(batch, wrapper))
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return changes, report.peak


def error(found, expected):
    found, expected = (
        torch.cat([x.flatten() for x in each.values()]) for each in (found, expected)
    )
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize('build', MODELS)
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(end_to_end_from=0, update='parameter'),
        dict(end_to_end_from=0, local_loss_weight=0.1),
        dict(partition=dict(type='UniformPartition', num_modules=1)),
        dict(amp=dict(dtype='bfloat16')),
    ],
    ids=['local', 'exact', 'joint', 'one module', 'bfloat16'],
)
def test_updates_are_those_of_full_precision_in_less_memory(build, options):
    plain, peak = train(build, None, **options)
    light, light_peak = train(build, 8, **options)
    coarse, _ = train(build, 4, **options)
    assert light_peak < peak
    # Half precision is nearly as coarse as 8 bits.
    factor = 2 if 'amp' in options else 3
    assert 0 < factor * error(light, plain) < error(coarse, plain) < 0.5


@pytest.mark.parametrize('build', MODELS)
def test_losses_are_exact(build, monkeypatch):
    """The bias in front of a loss has the sum of its gradients, if nothing else."""
    monkeypatch.setattr(compressed_activations, '_SMALLEST', 1)
    model = build()
    last = [name for name, _ in model.named_parameters() if name.endswith('bias')][-1]

    def update():
        return train(build, 8, end_to_end_from=0)[0][last]

    plain = train(build, None, end_to_end_from=0)[0][last]
    assert torch.equal(update(), plain) and plain.any()
    monkeypatch.setattr(memory_patches, '_uncompressed', lambda forward: forward)
    assert not torch.equal(update(), plain)


def test_max_pools_save_bytes():
    model = classifier()
    x = torch.rand(2, 16, 16, 16, requires_grad=True)
    pool = model.backbone.maxpool
    ((submodule, wrap),) = [p for p in compression_patches(model) if p[0] is pool]
    with patched(submodule, wrap):
        out = pool(x)
    assert type(out.grad_fn).__name__ == '_MaxPoolBackward'


@pytest.mark.parametrize('bits', [1, 16, True, '8'])
def test_other_numbers_are_refused(bits):
    with pytest.raises(ValueError, match='activation_bits must be None, 8 or 4'):
        build_wrapper(classifier(), activation_bits=bits)


def test_the_planner_measures_compressed_modules():
    def predicted(bits):
        wrapper = build_wrapper(classifier(), activation_bits=bits)
        return sum(unit.saved for unit in wrapper._measure((8, 3, 96, 96)))

    assert predicted(8) < 0.75 * predicted(None)
