"""To which module a peak's bytes are counted."""

import pytest
import torch
from test_memory_split import spike, split
from torch import nn
from torch.utils.checkpoint import checkpoint

from man_mm.core.storages import tensor_bytes

torch.set_num_threads(1)


def test_the_innermost_group_counts():
    inner, outer = nn.Linear(10, 10), nn.Sequential()
    outer.extend([nn.Linear(10, 10), inner, nn.ReLU()])
    x, kept = torch.ones(100, 10), []

    def step():
        kept[:] = [outer(x), x + 1]
        spike()

    assert split(step, groups=dict(outer=outer, inner=inner))[1] == {
        'outer': 2 * 4000,  # inputs of `inner`, and of what follows the last layer
        'other': 4000,
    }
    kept.clear()

    def backward():
        outer(x).sum().backward()
        spike()

    modules = split(backward, groups=dict(outer=outer, inner=inner))[1]
    assert modules == dict(outer=440, inner=440)


def test_backward_belongs_to_the_module_whose_forward_made_the_node(monkeypatch):
    first, second = nn.Linear(10, 20), nn.Linear(20, 30)
    x, kept = torch.ones(100, 10), []

    def step():
        middle = first(x)
        middle.register_hook(spike)
        y = second(middle)
        y.register_hook(kept.append)
        loss = y.square().sum()
        del middle, y
        loss.backward()
        kept.clear()

    def check():
        kinds, modules = split(step, groups=dict(first=first, second=second))
        assert kinds.pop('gradients') == tensor_bytes(second)
        # The gradient of its input, the square's of its output, and the loss.
        assert kinds == {'temporaries': 100 * 20 * 4 + 100 * 30 * 4 + 4 + 4}
        assert modules.pop('second') == tensor_bytes(second) + 100 * 20 * 4
        assert modules == {'other': 100 * 30 * 4 + 4 + 4}

    check()
    monkeypatch.setattr(torch.autograd, '_get_sequence_nr', lambda: 0)
    first.zero_grad()
    second.zero_grad()
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_what_checkpointing_computes_again(use_reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 10)

        def forward(self, x):
            return checkpoint(self.run, x, use_reentrant=use_reentrant)

        def run(self, x):
            y = self.first(x).tanh()
            if y.requires_grad:  # not so in the first pass of a reentrant region
                y.register_hook(spike)
            return self.second(y)

    def step():
        block((x + 1).tanh()).sum().backward()

    x = torch.ones(100, 10, requires_grad=True)
    block = Block()
    kinds, modules = split(step, groups=dict(block=block, second=block.second))
    grads = tensor_bytes(block.second)
    # Only reentrant regions compute their output again.
    output = 4000 if use_reentrant else 0
    assert kinds == {
        'gradients': grads,
        'saved activations': 4000 + 8000,  # the region's input, and in it
        'temporaries': 8000 + output + 4 + 4,  # a gradient, and of the loss
    }
    assert modules.pop('other') == 4000 + 4 + 4
    # Without reentrance, the second layer asks for what the first one computes.
    assert sum(modules.values()) == 2 * 8000 + output + grads
    assert modules['second'] >= 8000 + output + grads
