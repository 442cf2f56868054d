"""PredSimHead matches similarities, as its paper defines them."""

import pytest
import torch
from conftest import build_cifar_classifier, build_wrapper, labelled_images

from man_mm.aux_heads.classifier import label_scores
from man_mm.aux_heads.predsim import similarity_matrix


def similarity_by_hand(rows):
    size = len(rows)
    matrix = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            a, b = rows[i] - rows[i].mean(), rows[j] - rows[j].mean()
            matrix[i, j] = (a * b).sum() / (a.norm() * b.norm())
    return matrix


def test_similarity_matrix():
    rows = torch.rand(5, 7)
    by_hand = similarity_by_hand(rows)
    torch.testing.assert_close(similarity_matrix(rows), by_hand)
    uncentred = (
        torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    )
    assert not torch.allclose(uncentred, by_hand)  # control


def test_labels_of_one_class_are_alike():
    labels = label_scores(labelled_images(6, classes=3)['data_samples'], 10)
    assert labels.sum(1).tolist() == [1.0] * 6
    alike = similarity_matrix(labels)
    assert alike[0, 3] == pytest.approx(1) and alike[0, 1] == pytest.approx(-1 / 9)


@pytest.mark.parametrize('beta', [0.0, 0.3, 1.0])
def test_loss_by_hand(beta):
    model = build_cifar_classifier()
    aux_head = dict(type='PredSimHead', beta=beta)
    head = build_wrapper(model, aux_head=aux_head).learner.heads[0]
    targets = labelled_images(6, classes=3)['data_samples']
    map_ = torch.randn(6, 8, 16, 16)
    losses = head({head.own: map_}, targets, None)

    spread = head.conv(map_).flatten(2).std(2)
    labels = label_scores(targets, 10)
    gap = similarity_by_hand(spread) - similarity_by_hand(labels)
    torch.testing.assert_close(losses['loss_sim'], beta * gap.square().mean())
    pooled = torch.nn.functional.adaptive_avg_pool2d(map_, head.side).flatten(1)
    wanted = head.classifier.loss((pooled,), targets)['loss']
    torch.testing.assert_close(losses['loss_pred'], (1 - beta) * wanted)


def test_the_classifier_sees_at_most_2048_features():
    model = build_cifar_classifier()
    heads = build_wrapper(model, aux_head=dict(type='PredSimHead')).learner.heads
    assert [head.classifier.in_channels for head in heads] == [8 * 16**2, 16 * 11**2]


def test_a_weight_out_of_range():
    with pytest.raises(ValueError, match='aux_head.beta must be in'):
        build_wrapper(
            build_cifar_classifier(), aux_head=dict(type='PredSimHead', beta=2)
        )
