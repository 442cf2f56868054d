"""Activation checkpointing inside modules."""

import pytest
import torch
from networks import all_params, build, equal, train_step
from torch import nn

from man_mm.core.checkpointing import recomputed
from man_mm.core.patches import patched
from man_mm.measure.memory import measure_memory


def block():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)
    )


def run(wrap=None):
    unit, x = block(), torch.randn(4, 2, 8, 8)
    with patched(unit, wrap(unit) if wrap else lambda forward: forward):
        torch.manual_seed(1)
        out = unit(x)
    out.square().sum().backward()  # after the patch is gone, as in a real step
    return [out, *(p.grad for p in unit.parameters())], unit.state_dict()


def test_gradients_and_running_statistics_are_equal():
    assert equal(run(), run(recomputed))


def test_recomputing_without_care_moves_the_running_statistics_twice():
    def careless(_unit):
        return lambda forward: (
            lambda *args: torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False
            )
        )

    (plain, state), (recomputed_, moved) = run(), run(careless)
    assert equal(plain, recomputed_)
    assert not equal(state, moved)


def test_the_modes_of_the_norms_are_put_back_if_the_backward_pass_fails():
    unit = block()

    def fail(_grad):
        raise RuntimeError('failed')

    with patched(unit, recomputed(unit)):
        out = unit(torch.randn(4, 2, 8, 8))
    count = unit[1].num_batches_tracked
    unit[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match='failed'):
        out.sum().backward()
    assert unit[1].momentum == 0.1 and unit[1].num_batches_tracked is count


def recompute(*names):
    def patches(learner):
        submodules = [learner.model.get_submodule(name) for name in names]
        return tuple((m, recomputed(m)) for m in submodules)

    return patches


def trained(depth=3, cuts=None, patches=None):
    learner = build(depth, cuts)
    if patches:
        learner.patches = patches(learner)
    optimizer = torch.optim.SGD(all_params(learner), 0.1)
    for _ in range(2):
        train_step(learner, optimizer)
    step = measure_memory(lambda: train_step(learner, optimizer))
    return step.peak, learner.model.state_dict()


@pytest.mark.parametrize('names', [['stage1'], ['stage2', 'stage3']])
def test_recomputed_stages_of_a_network_train_equally(names):
    assert equal(trained()[1], trained(patches=recompute(*names))[1])


def test_memory_is_saved_where_the_peak_is():
    stages = recompute('stage2', 'stage3', 'stage4')
    assert trained(4, ['stage1'], stages)[0] < trained(4, ['stage1'])[0]


def test_patches_are_gone_after_the_step():
    learner = build(3)
    learner.patches = recompute('stage2')(learner)
    before = learner.model.stage2.forward
    train_step(learner, torch.optim.SGD(all_params(learner), 0.1))
    assert learner.model.stage2.forward == before
    assert 'forward' not in vars(learner.model.stage2)
    learner.model.stage2.forward = before  # as mmengine's tools leave it
    train_step(learner, torch.optim.SGD(all_params(learner), 0.1))
    assert vars(learner.model.stage2)['forward'] is before
