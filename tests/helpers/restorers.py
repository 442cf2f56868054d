"""What the tests of super-resolution networks share."""

import torch
from conftest import build_restorer, build_wrapper, image_pairs


def same(a, b):
    """Bitwise equality of state dicts."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def weights(model, wrapper):
    return {**model.state_dict(), **wrapper.learner.heads.state_dict(prefix='heads.')}


def in_float64(name, **local_learning):
    """A model, its wrapper, and a batch that has gone through the preprocessor."""
    model = build_restorer(name).double()
    data = model.data_preprocessor(image_pairs(), training=True)
    samples = data['data_samples']
    samples.gt_img = samples.gt_img.double()
    data = dict(inputs=data['inputs'].double(), data_samples=samples)
    return model, build_wrapper(model, **local_learning), data
