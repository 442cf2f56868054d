"""The loss at the centers of objects."""

import pytest
import torch
from conftest import (
    batch_of,
    build_detector,
    build_wrapper,
    check_local_losses_fall,
    detector_config,
)
from torch.nn.functional import cross_entropy

from man_mm.aux_heads.centers import CenterClassifier, at_centers

BOXES = torch.tensor([[0.0, 0, 16, 16], [20, 4, 28, 12], [90, 70, 130, 90]])


def test_vectors_are_those_at_the_centers():
    map_ = torch.arange(2 * 8 * 12.0).view(2, 1, 8, 12)
    vectors = at_centers(map_, 8, [BOXES, BOXES[:0]])
    # (8, 8), (24, 8) and (110, 80), which is outside of the map.
    assert vectors[:, 0].tolist() == [12 + 1, 12 + 3, 7 * 12 + 11]


def test_the_loss_is_that_of_a_linear_classifier():
    torch.manual_seed(0)
    centers, map_ = CenterClassifier(4, 3), torch.rand(2, 4, 8, 12)
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    loss = centers(map_, 8, [BOXES[:2], BOXES[2:]], labels)
    vectors = torch.stack([map_[0, :, 1, 1], map_[0, :, 1, 3], map_[1, :, 7, 11]])
    scores = centers.classifier(vectors)
    losses = cross_entropy(scores, torch.tensor([0, 2, 1]), reduction='none')
    torch.testing.assert_close(loss, losses.sum())
    other = centers(map_, 8, [BOXES[:2], BOXES[2:]], [labels[0], labels[1] + 1])
    assert (loss - other).abs() > 1e-3  # control


def test_images_without_objects():
    centers = CenterClassifier(4, 3)
    none = torch.zeros(0, dtype=torch.long)
    loss = centers(torch.rand(2, 4, 8, 12), 8, [BOXES[:0]] * 2, [none] * 2)
    loss.backward()
    assert loss == 0 and not centers.classifier.weight.grad.any()


def first_losses(kind='retinanet', classes=None, **options):
    torch.manual_seed(0)
    cfg = detector_config(kind, 18)
    if classes:
        cfg.model.bbox_head.num_classes = classes
    wrapper = build_wrapper(model := build_detector(cfg), aux_head=options)
    seen = {}
    wrapper.learner.heads[0].register_forward_hook(
        lambda module, args, terms: seen.update(terms)
    )
    batch = batch_of()
    if classes == 1:
        for sample in batch['data_samples']:
            sample.gt_instances.labels.zero_()
    model.train_step(batch, wrapper)
    return {name: float(loss) for name, loss in seen.items() if 'loss' in name}


def test_the_weight_scales_the_term_alone(kind):
    one, two = (first_losses(kind, center_weight=weight) for weight in (0.2, 0.4))
    assert two.pop('loss_center') == pytest.approx(2 * one.pop('loss_center'))
    assert one == two
    assert first_losses(kind).keys() == one.keys()


def test_one_class_has_no_others_to_tell_it_from():
    assert 'loss_center' not in first_losses(classes=1, center_weight=0.2)


def test_local_losses_fall():
    model = build_detector(detector_config('retinanet', 18))
    options = dict(aux_head=dict(center_weight=0.2))
    check_local_losses_fall(model, batch_of(), 6, **options)
