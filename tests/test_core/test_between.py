"""Operations between submodules that are recorded and repeated."""

import pytest
import torch
from torch import nn

from man_mm.core import ExactSteps, LocalLearner, Unit, split
from man_mm.core.between import Between, Branch
from man_mm.core.returned import sizes_of, tensor_of, with_tensor


def record(function, source):
    between = Between(source)
    between.start()
    entered = function(source)
    between.stop(entered)
    return between


def in_place(x):
    x = x.clone()
    x += 1
    x[0].mul_(3)
    return x


@pytest.mark.parametrize(
    'function',
    [
        lambda x: x,
        lambda x: x.transpose(0, 1).reshape(2, 3),
        lambda x: torch.cat([x.chunk(2, dim=1)[1], 2 * x, x.new_ones(3, 1)], dim=1),
        in_place,
    ],
)
def test_repeats_what_was_computed(function):
    between = record(function, torch.randn(3, 2))
    other = torch.randn(3, 2, requires_grad=True)
    result = between.again(other)
    assert torch.equal(result, function(other))
    result.sum().backward()
    assert other.grad.abs().sum() > 0
    assert not torch.equal(result, between.again(torch.zeros(3, 2)))  # control


def test_keeps_nothing_that_follows_from_the_source():
    between = record(lambda x: (x + 1) * 2, torch.randn(3))
    between.source = None
    kept = [arg for op in between._operations for arg in op.args[0]]
    assert not any(isinstance(arg, torch.Tensor) for arg in kept)


def test_does_not_record_after_it_has_stopped():
    between = record(torch.relu, torch.randn(3))
    torch.relu(torch.randn(3))
    assert len(between._operations) == 1


def test_what_does_not_follow_cannot_be_repeated():
    between = record(lambda x: torch.from_numpy(x.numpy() + 1), torch.randn(3))
    with pytest.raises(RuntimeError, match='does not follow from what the one before'):
        between.again(torch.ones(3))


@pytest.mark.parametrize('has_gap', [False, True])
def test_a_branch_hands_its_graph_to_the_next_unit_alone(has_gap):
    weight = torch.ones(3, requires_grad=True)
    branch = Branch(has_gap)
    x = branch.leave(2 * weight)
    assert not x.requires_grad
    entered = branch.rejoin(x + 1 if has_gap else x)
    assert torch.equal(entered, 2 * weight + has_gap)
    assert entered.requires_grad


def test_sizes_behind_a_tensor():
    tokens = torch.zeros(1, 6, 4)
    output = tokens, (2, 3)
    assert tensor_of(output) is tokens and sizes_of(output) == ((2, 3),)
    assert with_tensor(output, tokens + 1)[1] == (2, 3)
    for other in (
        (tokens, tokens),
        (tokens, None),
        (tokens,),
        [tokens, 2],
        None,
        tokens,
    ):
        assert tensor_of(other) is other and sizes_of(other) == ()


class Gaps(nn.Module):
    """Layers with a parameter and a rearrangement between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        x = self.layers[0](x)
        x = self.layers[1](self.scale * x.flip(1))
        return self.layers[2](torch.tanh(x))


@pytest.mark.parametrize('cuts', [['layers.0'], ['layers.1'], ['layers.0', 'layers.1']])
@pytest.mark.parametrize('gaps', [True, False])
def test_exact_steps_repeat_gaps(cuts, gaps):
    torch.manual_seed(0)
    model = Gaps()
    units = [
        Unit('layers.0'),
        Unit('layers.1', params=('scale',), gaps=gaps),
        Unit('layers.2', gaps=gaps),
    ]
    modules = split(model, units, cuts)
    x = torch.randn(5, 4)
    model(x).square().mean().backward()
    plain = [param.grad for param in model.parameters()]
    model.zero_grad()
    steps = ExactSteps(LocalLearner(model, modules, [nn.Identity() for _ in cuts]))
    with steps.step():
        loss = model(x).square().mean()
    loss.backward()
    steps.replay()
    exact = [param.grad for param in model.parameters()]
    assert all(grad is not None for grad in exact) or not gaps
    pairs = zip(exact, plain, strict=True)
    equal = all(a is not None and torch.allclose(a, b) for a, b in pairs)
    assert equal == gaps  # control: without the record, gradients are wrong


def test_an_error_in_a_gap_ends_the_record():
    model = Gaps()
    units = [Unit('layers.0'), Unit('layers.1', gaps=True), Unit('layers.2', gaps=True)]
    modules = split(model, units, ['layers.0'])
    steps = ExactSteps(LocalLearner(model, modules, [nn.Identity()]))
    with pytest.raises(RuntimeError), steps.step():
        model.scale.data = torch.ones(3)
        model(torch.randn(5, 4))
    assert torch.overrides._get_current_function_mode() is None
