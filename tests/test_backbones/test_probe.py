"""What the probe refuses, and that it leaves the model as it was."""

import pytest
import torch
from plain_backbones import (
    Failing,
    LongSkip,
    Tuples,
    Twice,
    TwoBranches,
    Unused,
    plain,
    unchanged,
)

from man_mm.backbones import find_units, probe

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ('kind', 'unit'),
    [
        (TwoBranches, 'layer1.1'),
        (LongSkip, 'layer2.0'),
        (Twice, 'layer1.0'),
        (Unused, 'layer1.1'),
        (Tuples, 'layer2.1'),
    ],
)
def test_what_is_no_chain_is_refused_by_the_probe(kind, unit):
    model = plain(kind)
    units = find_units(model)  # by its base class
    message = f"{kind.__name__} cannot be cut around 'backbone.{unit}'.*single path"
    with pytest.raises(ValueError, match=message):
        probe(model, units)
    _, taps = probe(plain(), units)
    assert len(taps) == 5  # the same modules as a chain


@pytest.mark.parametrize('training', [True, False])
def test_the_probe_leaves_the_model_as_it_was(training):
    model = plain().train(training)
    model.backbone.layer1[0].train(not training)  # as a frozen stage
    model.backbone.layer2[1].requires_grad_(False)
    units = find_units(model)
    assert unchanged(model, lambda: probe(model, units))
    if training:  # a forward pass without its care does not
        assert not unchanged(model, lambda: model.backbone(torch.ones(2, 1, 16, 16)))
    assert not unchanged(model, lambda: model.backbone.train(not training))


def test_a_probe_that_fails_leaves_the_model_as_it_was():
    model = plain(Failing)

    def call():
        with pytest.raises(ValueError, match='failed before the last') as info:
            probe(model, find_units(model))
        assert isinstance(info.value.__cause__, ArithmeticError)

    assert unchanged(model, call)
