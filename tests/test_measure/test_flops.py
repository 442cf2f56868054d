import pytest
import torch
from torch import nn

from man_mm.measure.flops import count_flops


@pytest.mark.parametrize(('needs_grad', 'passes'), [(False, 2), (True, 3)])
def test_a_convolution_and_its_backward(needs_grad, passes):
    layer = nn.Conv2d(3, 16, 5, padding=2)
    x = torch.randn(4, 3, 8, 6, requires_grad=needs_grad)
    forward = 2 * (4 * 16 * 8 * 6) * (3 * 5 * 5)  # a product and a sum each
    assert count_flops(lambda: layer(x)) == forward
    # The weight's gradient costs as much, and so does the input's.
    assert count_flops(lambda: layer(x).sum().backward()) == passes * forward


def test_other_ops_are_free():
    assert count_flops(lambda: torch.randn(9).exp().sum()) == 0
