"""The heads of examples/memory_leads learn, with memories of fixed size."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    batch_of,
    build_cifar_classifier,
    build_detector,
    build_restorer,
    build_wrapper,
    check_local_losses_fall,
    detector_config,
    image_pairs,
    labelled_images,
)

torch.set_num_threads(1)

sys.path.append(str(Path(__file__).resolve().parent.parent / 'examples'))
from memory_leads.detectors import at_objects  # noqa: E402
from memory_leads.gradients import shares  # noqa: E402
from memory_leads.memories import ClassMeans, Queue  # noqa: E402

# Options, and the memory that a step changes, if there is one.
HEADS = {
    'prototypes': (dict(type='Prototypes'), 'prototypes.means'),
    'trained-prototypes': (dict(type='Prototypes', trained=True), 'prototypes.means'),
    'soft-labels': (dict(type='SoftLabels'), 'answers.means'),
    'uniform': (dict(type='SoftLabels', uniform=True), None),
    'by-channel': (dict(type='NextGradient'), 'gradients.means'),
    'by-class': (dict(type='NextGradient', by_class=True), 'gradients.means'),
    'queue': (dict(type='Contrast', length=6), 'queue.vectors'),
    'batch': (dict(type='Contrast', length=6, use_queue=False), None),
    'running-head': (dict(type='RunningHead'), 'reader.weight'),
    'learned-head': (dict(type='RunningHead', learned=True), None),
    'retrieval': (dict(type='Retrieval', length=6), 'queue.vectors'),
    'reconciled': (dict(type='Reconciled'), None),
}
JOINT = dict(end_to_end_from=0.0, local_loss_weight=0.1)


def train(aux_head, steps, **local_learning):
    """The first head's state after each of some steps, and all its wrapper's state."""
    model = build_cifar_classifier()
    options = dict(aux_head=dict(aux_head, norm='BN'), **local_learning)
    wrapper = build_wrapper(model, **options)
    states = []
    for _ in range(steps):
        model.train_step(labelled_images(), wrapper)
        state = wrapper.learner.heads[0].state_dict()
        states.append({name: x.clone() for name, x in state.items()})
    return states, wrapper.state_dict()


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('steps', ['local', 'joint'])
def test_memory_moves_and_keeps_its_size(name, steps):
    aux_head, memory = HEADS[name]
    if steps == 'joint' and aux_head['type'] in ('NextGradient', 'Reconciled'):
        pytest.skip('true gradients arrive there')
    options = JOINT if steps == 'joint' else {}
    states, _ = train(aux_head, 3, **options)
    first, *_, last = states
    assert {k: x.shape for k, x in first.items()} == {
        k: x.shape for k, x in last.items()
    }
    assert all(x.isfinite().all() for x in last.values())
    if memory is not None:
        assert not first[memory].equal(last[memory])


@pytest.mark.parametrize('name', HEADS)
def test_local_losses_fall(name):
    aux_head, _ = HEADS[name]
    aux_head = dict(aux_head, norm='BN')
    check_local_losses_fall(
        build_cifar_classifier(), labelled_images(), 12, aux_head=aux_head
    )


@pytest.mark.parametrize('steps', ['local', 'joint'])
@pytest.mark.parametrize(
    'name, memory',
    [('DetPrototypes', 'prototypes.means'), ('DetContrast', 'queue.vectors')],
)
def test_memories_of_detectors_move(name, memory, steps):
    model = build_detector(detector_config('retinanet', 18))
    options = JOINT if steps == 'joint' else {}
    wrapper = build_wrapper(model, aux_head=dict(type=name), **options)
    memories = []
    for seed in range(2):
        torch.manual_seed(seed)
        model.train_step(batch_of(), wrapper)
        memories.append(wrapper.learner.heads[0].state_dict()[memory].clone())
    assert memories[0].any()
    assert not memories[0].equal(memories[1])
    assert all(loss.isfinite() for loss in wrapper.learner.losses.values())


@pytest.mark.parametrize('steps', ['local', 'joint'])
@pytest.mark.parametrize('name', ['edsr', 'srresnet'])
def test_memories_of_restorers_move(name, steps):
    model = build_restorer(name)
    options = JOINT if steps == 'joint' else {}
    aux_head = dict(type='SRPrototypes', channels=4, num_codes=8)
    wrapper = build_wrapper(model, aux_head=aux_head, **options)
    states = []
    for seed in range(2):
        model.train_step(image_pairs(seed=seed), wrapper)
        states.append(wrapper.learner.heads[0].state_dict())
    for memory in ('prototypes.means', 'codebook.means'):
        assert states[0][memory].any()
        assert not states[0][memory].equal(states[1][memory])
    assert all(loss.isfinite() for loss in wrapper.learner.losses.values())


def test_codes_are_those_of_the_nearest_patches():
    wrapper = build_wrapper(
        build_restorer('edsr'),
        aux_head=dict(type='SRPrototypes', channels=4, num_codes=2, momentum=0.5),
    )
    head = wrapper.learner.heads[0]
    images = torch.rand(2, 3, 32, 32)
    patches = head.patches(images)
    # The second pixel of the first row is the fifth of the input.
    patch = images[0, :, :4, 6:12]
    padded = torch.cat([torch.zeros(3, 2, 6), patch], 1)
    assert torch.allclose(patches[1], (padded - padded.mean()).flatten(), atol=1e-6)
    features = torch.arange(2 * 16 * 16.0).view(2, 1, 16, 16)
    assert head.at_pixels(features)[:6, 0].tolist() == [0, 4, 8, 12, 64, 68]
    assert len(patches) == len(head.at_pixels(features)) == 2 * 4 * 4
    codes = head.codes_of(patches)
    assert codes[0] == 0 and codes[-1] == 1  # the first batch's own patches
    assert head.codes_of(patches[[3, 3]]).unique().numel() == 1
    near = head.codebook.means[[1, 0]] + 1e-3
    assert head.codes_of(near).tolist() == [1, 0]


def test_objects_are_found_at_their_centers():
    (sample,) = batch_of(size=1, height=64, width=96)['data_samples']
    sample.set_metainfo(dict(pad_shape=(64, 96)))
    map_ = torch.arange(8 * 12.0).view(1, 1, 8, 12)
    boxes = sample.gt_instances.bboxes
    x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2 // 8
    vectors, labels = at_objects(map_, [sample])
    assert vectors[:, 0].tolist() == (12 * y + x).tolist()
    assert labels.equal(sample.gt_instances.labels)


def test_means_are_those_of_the_classes():
    memory = ClassMeans(3, 32, momentum=0.5)
    one, two = torch.full((1, 32), 1.0), torch.full((1, 32), 4.0)
    memory.remember(torch.cat([one, two, two]), torch.tensor([0, 1, 0]))
    assert memory.means[:, 0].tolist() == [2.5, 4.0, 0.0]
    memory.remember(two, torch.tensor([1]))
    memory.remember(one, torch.tensor([1]))
    assert memory.means[:, 0].tolist() == [2.5, 2.5, 0.0]


def test_transferred_prototypes_stay(tmp_path):
    _, state = train(dict(type='Prototypes'), 2)
    path = tmp_path / 'other.pth'
    torch.save(dict(optimizer=state), path)
    options = dict(type='Prototypes', load_from=str(path))
    states, _ = train(options, 2)
    expected = state['local_learning']['heads']['0.prototypes.means']
    assert all(x['prototypes.means'].equal(expected) for x in states)
    assert expected.any()
    shifted, _ = train(dict(options, shifted=True), 1)
    assert shifted[0]['prototypes.means'][0].equal(expected[1])


def test_a_queue_forgets_what_is_oldest():
    queue = Queue(6, 2)
    for step in range(4):
        queue.remember(torch.full((2, 2), float(step)), torch.tensor([step, step]))
    assert queue.classes.tolist() == [3, 3, 2, 2, 1, 1]


def test_reconciled_gradients_agree_more():
    """With a weight, neighbouring gradients grow alike; without one, they do not."""

    def distance(weight):
        torch.manual_seed(0)
        model, batch = build_cifar_classifier(), labelled_images(side=32)
        wrapper = build_wrapper(
            model,
            optimizer=dict(type='AdamW', lr=3e-3),
            aux_head=dict(type='Reconciled', norm='BN', weight=weight),
        )
        head, terms = wrapper.learner.heads[1], []
        term = head.term

        def noted(*args):
            terms.append(term(*args))
            return terms[-1]

        head.term = noted
        for _ in range(40):
            model.train_step(batch, wrapper)
        return terms[-1].item()

    assert distance(0.0) > 0.95
    assert distance(10.0) < 0.92


def test_energy_that_a_memory_could_hold():
    labels = torch.tensor([0, 0, 1, 1])
    by_class = torch.randn(2, 3, 1, 1)
    by_class -= by_class.mean(0)
    by_location = by_class + torch.randn(2, 3, 4, 4)

    def held(gradients):
        sums = torch.stack([gradients[labels == c].sum(0) for c in range(2)])
        counts = labels.bincount().float()
        return shares(sums, gradients.square().sum().item(), counts)

    alike = held(by_class[labels].expand(4, 3, 4, 4))
    assert alike == pytest.approx(
        dict(channel=0, class_channel=1, class_location=1), abs=1e-6
    )
    placed = held(by_location[labels])
    assert placed['class_location'] == pytest.approx(1)
    assert placed['class_channel'] < 0.99
    # Of single images' gradients, means hold as much as chance has it.
    single = held(torch.randn(4, 3, 64, 64))
    assert single['class_location'] == pytest.approx(2 / 4, rel=0.05)
