"""MANHead chooses by the model, and heads tell which earlier maps they read."""

import pytest
from conftest import (
    batch_of,
    build_classifier,
    build_detector,
    build_wrapper,
    detector_config,
    labelled_images,
)

from man_mm.aux_heads import MANClsHead, MANDetHead


class Recorder(dict):
    """Maps that remember which of them were looked up."""

    def __init__(self, maps):
        super().__init__(maps)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def record(head):
    looked_up, forward = [], head.forward

    def recorded(maps, targets, bank):
        maps = Recorder(maps)
        losses = forward(maps, targets, bank)
        looked_up.append(maps.names)
        return losses

    head.forward = recorded
    return looked_up


def build(kind):
    if kind == 'classifier':
        return build_classifier(18), labelled_images(), MANClsHead
    return build_detector(detector_config(kind, 18)), batch_of(), MANDetHead


@pytest.mark.parametrize('use_bank', [True, False])
@pytest.mark.parametrize(
    ('kind', 'mode'),
    [
        ('retinanet', 'light'),
        ('retinanet', 'faithful'),
        ('faster_rcnn', 'light'),
        ('faster_rcnn', 'faithful'),
        ('classifier', 'light'),
    ],
)
def test_reads_are_the_earlier_maps_that_are_looked_up(kind, mode, use_bank):
    model, batch, expected = build(kind)
    aux_head = dict(mode=mode, use_bank=use_bank)
    if mode == 'faithful' and not use_bank:
        with pytest.raises(ValueError, match='use_bank=True'):
            build_wrapper(model, aux_head=aux_head)
        return
    wrapper = build_wrapper(model, aux_head=aux_head)
    learner, earlier = wrapper.learner, set()
    looked_up = [record(head) for head in learner.heads]
    model.train_step(batch, wrapper)
    for module, head, (names,) in zip(
        learner.modules, learner.heads, looked_up, strict=False
    ):
        assert type(head) is expected
        assert head.reads == names & earlier
        assert head.needs_bank == bool(use_bank and earlier)
        earlier.add(module.cut)
    assert any(head.reads for head in learner.heads) == use_bank


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('classifier', dict(num_convs=1), r"\['num_convs'\].*MANClsHead takes \['mode"),
        ('retinanet', dict(width=32), r"\['width'\].*MANDetHead takes \['mode'"),
        ('classifier', dict(mode='full'), "mode must be one of .'light', 'faithful'"),
        ('classifier', dict(fusion='sum'), "fusion must be one of .'concatenate', "),
        ('classifier', dict(num_blocks=-1), 'num_blocks at least 0'),
    ],
)
def test_options_that_a_head_does_not_have(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build_wrapper(build(kind)[0], aux_head=options)


def test_a_model_with_another_head():
    model = build_classifier(18)
    model.head = model.head.fc
    with pytest.raises(ValueError, match='for ImageClassifier; it serves.*ClsHead'):
        build_wrapper(model)
