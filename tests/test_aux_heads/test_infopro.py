"""InfoProHead reconstructs the image that was loaded, and contrasts classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    build_cifar_classifier,
    build_restorer,
    build_wrapper,
    labelled_images,
)

from man_mm.aux_heads.infopro import contrastive_loss

AT = dict(type='UniformPartition', num_modules=7)


def build(**options):
    model = build_cifar_classifier()
    aux_head = dict(type='InfoProHead', **options)
    return model, build_wrapper(model, aux_head=aux_head, partition=AT)


def contrast_by_hand(features, labels):
    rows = [row / row.norm() for row in features]
    terms = []
    for i, a in enumerate(rows):
        others = [math.exp(a @ b / 0.07) for j, b in enumerate(rows) if j != i]
        for j, b in enumerate(rows):
            if i != j and labels[i] == labels[j]:
                terms.append(-math.log(math.exp(a @ b / 0.07) / sum(others)))
    return sum(terms) / len(terms)


def test_contrastive_loss_by_hand():
    torch.manual_seed(0)
    features, labels = torch.randn(6, 5), torch.tensor([0, 1, 0, 2, 1, 0])
    by_hand = contrast_by_hand(features, labels)
    assert contrastive_loss(features, labels).item() == pytest.approx(by_hand, rel=1e-5)
    other = contrast_by_hand(features, labels.flip(0))  # control
    assert other != pytest.approx(by_hand, rel=1e-2)


def test_contrastive_loss_without_pairs_is_zero():
    features = torch.randn(3, 4, requires_grad=True)
    loss = contrastive_loss(features, torch.arange(3))
    loss.backward()
    assert loss == 0 and torch.equal(features.grad, torch.zeros(3, 4))


def test_gradients_of_the_contrastive_loss_are_finite():
    features = torch.randn(4, 4, requires_grad=True)
    contrastive_loss(features, torch.tensor([0, 0, 1, 2])).backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_weights_go_in_equal_steps():
    _, wrapper = build(lambda1=(6, 1), lambda2=(0, 2))
    weights = [head.weights for head in wrapper.learner.heads]
    assert [first for first, _ in weights] == pytest.approx([6, 5, 4, 3, 2, 1])
    assert [second for _, second in weights] == pytest.approx(
        [0, 0.4, 0.8, 1.2, 1.6, 2]
    )


def test_one_head_takes_the_first_weight():
    model = build_cifar_classifier()
    partition = dict(type='UniformPartition', num_modules=2)
    aux_head = dict(type='InfoProHead', lambda1=(6, 1))
    (head,) = build_wrapper(model, aux_head=aux_head, partition=partition).learner.heads
    assert head.weights == (6, 0.05)


@pytest.mark.parametrize('changed', [False, True])
def test_the_image_is_the_one_that_was_loaded(changed):
    model, wrapper = build()
    seen = []
    head = wrapper.learner.heads[5]
    original = F.binary_cross_entropy_with_logits
    batch = labelled_images(4, 16)
    loaded = torch.stack(batch['inputs'])
    if changed:  # control
        head.std += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F,
            'binary_cross_entropy_with_logits',
            lambda x, y: seen.append(y) or original(x, y),
        )
        model.train_step(batch, wrapper)
    assert len(seen) == 6
    assert torch.allclose(seen[5] * 255, loaded.float(), atol=1e-3) != changed


def test_loss_by_hand():
    _, wrapper = build(loss='cross_entropy', lambda1=(3, 0), lambda2=(2, 0))
    head = wrapper.learner.heads[0].eval()
    targets = labelled_images(4)['data_samples']
    maps = {head.own: torch.randn(4, 8, 16, 16), 'entry': torch.randn(4, 3, 16, 16)}
    losses = head(maps, targets, None)
    image = ((maps['entry'] * 64 + 127.5) / 255).clamp(0, 1)
    drawn = head.decoder(maps[head.own]).sigmoid()  # of the same size
    wanted = -(image * drawn.log() + (1 - image) * (1 - drawn).log()).mean()
    torch.testing.assert_close(losses['loss_image'], 3 * wanted)
    task = head.classifier.loss((head.features(maps[head.own]),), targets)['loss']
    torch.testing.assert_close(losses['loss_task'], 2 * task)


def test_bad_options():
    with pytest.raises(ValueError, match="aux_head.loss must be 'contrastive' or"):
        build(loss='mse')


def test_an_image_that_does_not_enter_the_first_unit():
    with pytest.raises(ValueError, match='does not enter the first unit'):
        build_wrapper(build_restorer('rrdb'), aux_head=dict(type='InfoProHead'))
