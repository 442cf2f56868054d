"""Operators of mmcv for GPUs, in steps that are not computed."""

import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention

from man_mm.measure import Uncomputed, measure_memory

SHAPES = [(64, 80), (32, 40)]
QUERIES = sum(h * w for h, w in SHAPES)
WIDTH, HEADS, POINTS = 64, 8, 4
FLOAT = 4


def peak(device):
    """Bytes of a forward and backward pass, and shapes of the gradients."""
    with Uncomputed(device):
        layer = MultiScaleDeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS)
        query = torch.zeros(1, QUERIES, WIDTH, requires_grad=True)
        places = torch.zeros(1, QUERIES, len(SHAPES), 2)
        shapes = torch.tensor(SHAPES)
        first = torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]])

        def step():
            out = layer(
                query.transpose(0, 1),
                reference_points=places,
                spatial_shapes=shapes,
                level_start_index=first,
            )
            out.sum().backward()

        report = measure_memory(step)
    return report.peak, {name: p.grad.shape for name, p in layer.named_parameters()}


def test_a_gpu_keeps_no_sampled_values():
    on_cpu, grads = peak('cpu')
    on_gpu, others = peak('cuda')
    assert others == grads
    sampled = QUERIES * WIDTH * len(SHAPES) * POINTS * FLOAT
    assert on_cpu - on_gpu > sampled
    assert peak('cpu')[0] == on_cpu  # nothing stays replaced


def test_dropout_keeps_a_byte_a_value():
    def saved(device):
        count = 2**20
        with Uncomputed(device):
            x = torch.zeros(count, requires_grad=True)
            layer, outs = torch.nn.Dropout(0.1), []
            report = measure_memory(lambda: outs.append(layer(x)))
            outs[0].sum().backward()
            assert x.grad.shape == x.shape
        return report.peak / count - FLOAT  # beside the output

    assert saved('cuda') == 1
    assert saved('cpu') == FLOAT


def test_tensors_that_are_moved_to_a_gpu_stay():
    with Uncomputed('cuda'):
        assert torch.zeros(2).cuda().device.type == 'cpu'
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(2).cuda()
