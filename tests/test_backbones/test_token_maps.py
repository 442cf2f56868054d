"""What blocks return, as maps."""

import pytest
import torch

from man_mm.backbones.token_maps import (
    channels_last_map,
    map_kind,
    same_map,
    token_map,
)


@pytest.mark.parametrize(
    ('shape', 'map_shape'),
    [
        ((1, 8, 4, 4), (1, 8, 4, 4)),
        ((1, 4, 4, 8), (1, 8, 4, 4)),
        ((1, 16, 8), (1, 8, 4, 4)),
        ((1, 17, 8), (1, 8, 4, 4)),
        ((1, 18, 8), (1, 8, 4, 4)),
    ],
)
def test_kinds(shape, map_shape):
    output = torch.randn(shape)
    map_ = map_kind(output)(output, ())
    assert map_.shape == map_shape
    assert map_.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    last = output[0, :, -1, -1] if shape[1] == 8 else output.flatten(1, -2)[0, -1]
    assert torch.equal(map_[0, :, -1, -1], last)


@pytest.mark.parametrize('shape', [(1, 19, 8), (1, 3, 64), (2, 16, 8), (1, 8)])
def test_what_is_no_map(shape):
    assert map_kind(torch.zeros(shape)) is None
    assert map_kind((torch.zeros(1, 16, 8), (4, 4))) is None


def test_sizes_among_the_arguments_of_a_block():
    tokens = torch.randn(2, 1 + 6, 8)
    for args in ((tokens, (2, 3)), (tokens, 2, 3), (tokens, (4, 6), (2, 3))):
        map_ = token_map(tokens, args, extra=1)
        assert torch.equal(map_[1, :, 1, 0], tokens[1, 1 + 3])
    with pytest.raises(ValueError, match='6 patches are no square'):
        token_map(tokens, (tokens, (4, 6)), extra=1)


def test_maps_stay_as_they_are():
    map_ = torch.randn(2, 8, 3, 3)
    assert same_map(map_, ()) is map_
    assert torch.equal(channels_last_map(map_.permute(0, 2, 3, 1), ()), map_)
