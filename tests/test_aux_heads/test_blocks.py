"""The layers of light heads."""

import pytest
import torch
from torch import nn

from man_mm.aux_heads.blocks import conv_block, num_groups


@pytest.mark.parametrize(
    ('channels', 'groups'), [(64, 8), (32, 8), (24, 6), (18, 2), (8, 2), (7, 1), (1, 1)]
)
def test_groups_have_four_channels_or_more(channels, groups):
    assert num_groups(channels) == groups
    assert channels % groups == 0


@pytest.mark.parametrize('channels', [8, 16, 64])
def test_what_is_in_a_map_of_one_location_passes(channels):
    norm = conv_block(4, channels, 1)[1]
    map_ = torch.randn(2, channels, 1, 1)
    assert norm(map_).std() > 0.5
    assert nn.GroupNorm(channels, channels)(map_).std() < 1e-3  # control
