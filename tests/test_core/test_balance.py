"""Joint steps whose local gradients are a share of the network's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import IMAGES, LABELS, PooledHead, all_params, build_model
from torch import nn

from man_mm.core import ExactSteps, LocalLearner, Unit, split
from man_mm.core.balance import BALANCED, balanced

torch.set_num_threads(1)


def build_learner(cuts):
    """A head reads the ends of all stages of its module."""
    model = build_model(4)
    modules = split(model, [Unit(f'stage{i + 1}', i) for i in range(4)], cuts)
    heads = [PooledHead(len(module.units)) for module in modules[:-1]]
    return LocalLearner(model.double(), modules, nn.ModuleList(heads).double())


def joint_grads(learner, weight, size=None):
    learner.micro_batch_size = size
    steps = ExactSteps(learner, weight)
    with steps.step(LABELS):
        loss = F.cross_entropy(learner.model(IMAGES.double()), LABELS)
    loss.backward()
    steps.replay()
    return [param.grad for param in all_params(learner)]


def expected_grads(learner):
    """By hand: a module at a time, and the two gradients of each boundary apart."""
    x, runs = IMAGES.double(), []
    stages = iter(learner.model)
    for module in learner.modules[:-1]:
        outputs = [x := next(stages)(x) for _ in module.units]
        x = x.detach().requires_grad_()
        runs.append((outputs, x))
    F.cross_entropy(nn.Sequential(*stages)(x), LABELS).backward()
    for (outputs, x), head in reversed([*zip(runs, learner.heads, strict=True)]):
        leaves = [output.detach().requires_grad_() for output in outputs]
        head(dict(enumerate(leaves)), LABELS, None).backward()
        factor = x.grad.norm() / leaves[-1].grad.norm() / len(runs)
        grads = [factor * leaf.grad for leaf in leaves]
        grads[-1] += x.grad
        torch.autograd.backward(outputs, grads)
    return [param.grad for param in all_params(learner)]


def check_close(grads, others):
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('cuts', [['stage1', 'stage3'], ['stage2']])
def test_local_gradients_are_a_share_of_the_networks_own(cuts):
    learner = build_learner(cuts)
    expected = expected_grads(copy.deepcopy(learner))
    check_close(joint_grads(copy.deepcopy(learner), BALANCED), expected)
    assert learner.model.stage1[0].weight.grad is None
    with pytest.raises(AssertionError):  # control
        check_close(joint_grads(learner, 1.0), expected)


def test_micro_batches_have_factors_of_their_own():
    learner = build_learner(['stage1', 'stage3'])
    learner.model.eval()
    whole = joint_grads(copy.deepcopy(learner), BALANCED)
    # Of one slice with all images, and of two whose factors differ.
    check_close(joint_grads(copy.deepcopy(learner), BALANCED, 4), whole)
    sliced = joint_grads(learner, BALANCED, 2)
    check_close(sliced[-2:], whole[-2:])  # the last head learns from its loss as it is
    for a, b in zip(sliced[:-4], whole[:-4], strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9


@pytest.mark.parametrize('scale', [0.0, 1e-3, 1e3])
def test_the_scale_of_a_local_loss_does_not_matter(scale):
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    own = torch.rand(2, 3, 4, 4)
    (scale * balanced({'a': x}, 'a', own, 0.5)['a'].square().sum()).backward()
    expected = 0.5 * own.norm() * x.detach() / x.detach().norm() if scale else 0 * own
    torch.testing.assert_close(x.grad, expected)
