"""The local pyramid: its levels, what it pools, and statistics that are folded."""

import torch
import torch.nn.functional as F

from man_mm.aux_heads.pyramid import Lateral, LocalPyramid
from man_mm.backbones import Tap


def test_without_the_bank_finer_levels_are_left_out():
    taps = [Tap('a', 0, 8, 8), Tap('b', 1, 16, 16)]
    full = LocalPyramid(taps, [8, 16, 32], channels=8)
    alone = LocalPyramid(taps[1:], [8, 16, 32], channels=8)
    assert full.levels == [8, 16, 32] and alone.levels == [16, 32]
    maps = {'a': torch.randn(2, 8, 9, 7), 'b': torch.randn(2, 16, 5, 4)}
    shapes = [tuple(x.shape) for x in full(maps)]
    assert shapes == [(2, 8, 9, 7), (2, 8, 5, 4), (2, 8, 3, 2)]


def test_without_an_slm_coarser_levels_are_pooled():
    taps = [Tap('a', 0, 8, 8)]
    pooled = LocalPyramid(taps, [8, 16, 32], channels=8, num_blocks=0)
    learned = LocalPyramid(taps, [8, 16, 32], channels=8)
    maps = {'a': torch.randn(2, 8, 9, 7)}
    shapes = [tuple(x.shape) for x in learned(maps)]
    assert [tuple(x.shape) for x in pooled(maps)] == shapes
    assert shapes[-1] == (2, 8, 3, 2)
    assert not list(pooled.slm.parameters()) and list(learned.slm.parameters())


def test_levels_that_no_map_reaches():
    coarse = Tap('a', 3, 8, 32)
    alone = LocalPyramid([coarse], [8, 16], channels=8)
    assert alone.levels == [32]
    (map_,) = alone({'a': torch.randn(2, 8, 3, 2)})
    assert map_.shape == (2, 8, 3, 2)


def test_finer_maps_than_the_finest_level_are_not_joined(monkeypatch):
    """A map of stride 1 or 2, as in SSD and YOLOv3, is large."""
    sizes = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, 'interpolate', lambda x, size: sizes.append(size) or interpolate(x, size)
    )
    pyramid = LocalPyramid([Tap('a', 0, 8, 2)], [8, 16], channels=8)
    maps = pyramid({'a': torch.randn(2, 8, 32, 32)})
    assert [map_.shape[-1] for map_ in maps] == [8, 4]
    assert sizes == [(8, 8)]
    sum(map_.sum() for map_ in maps).backward()
    assert all(param.grad is not None for param in pyramid.parameters())


def test_folded_statistics_equal_standardising_the_map():
    torch.manual_seed(0)
    lateral = Lateral(6, 4).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    by_hand = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(lateral(x, (mean, var)), lateral(by_hand))
    assert not torch.allclose(lateral(x), lateral(by_hand))  # control
