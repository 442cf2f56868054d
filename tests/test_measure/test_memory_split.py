"""What the peak of memory is split into; a spike of known bytes sets the peak."""

import pytest
import torch
from networks import (
    LABELS,
    OPTIMIZERS,
    WIDTH,
    LeakyLearner,
    all_params,
    build,
    model_loss,
    retain,
    train_step,
    update_at_once,
)
from torch import nn

from man_mm.core import ExactSteps, LocalLearner, MemoryBank
from man_mm.core.storages import tensor_bytes
from man_mm.measure import memory_split
from man_mm.measure.memory import measure_memory

torch.set_num_threads(1)

SPIKE = 10**7
MAP = 4 * WIDTH * 8 * 8 * 4  # bytes of a map of the small networks
STATISTICS = 2 * WIDTH * 4  # batch norm's of a batch, or the bank's of a map


def spike(*_):
    torch.empty(SPIKE, dtype=torch.uint8)


def split(fn, **kwargs):
    """Kinds and modules at the spike in ``fn``, without it and without zeros."""
    report = measure_memory(fn, **kwargs)
    assert sum(report.kinds.values()) == sum(report.modules.values()) == report.peak
    return [without_spike(part) for part in (report.kinds, report.modules)]


def without_spike(part):
    (where,) = [name for name, size in part.items() if size >= SPIKE]
    part = {**part, where: part[where] - SPIKE}
    return {name: size for name, size in part.items() if size}


# Kinds of known bytes.


def check_linear():
    layer, outputs = nn.Linear(50, 30), []

    def forward():
        outputs.append(layer(torch.randn(20, 50)))
        spike()

    assert split(forward)[0] == {
        'saved activations': 20 * 50 * 4,
        'temporaries': 20 * 30 * 4,
    }

    def step():
        layer(torch.randn(20, 50)).sum().backward()
        spike()

    assert split(step)[0] == {'gradients': tensor_bytes(layer)}


def test_a_linear_layer():
    check_linear()


@pytest.mark.parametrize('broken', ['_SAVED', '_ACCUMULATE'])
def test_a_split_that_misses_a_kind_is_found(broken, monkeypatch):
    if broken == '_SAVED':
        monkeypatch.setattr(memory_split, '_SAVED', memory_split._BANKED)
    else:
        monkeypatch.setattr('man_mm.measure.memory_regions._ACCUMULATE', 'other node')
    with pytest.raises(AssertionError):
        check_linear()


@pytest.mark.parametrize(
    ('grad', 'kind'), [(True, 'saved activations'), (False, 'temporaries')]
)
def test_saved_is_what_autograd_holds(grad, kind):
    x = torch.zeros(1000, requires_grad=True)
    y = []

    def fn():
        with torch.set_grad_enabled(grad):
            y[:] = [x.exp()]
        spike()

    assert split(fn)[0] == {kind: 4000}

    def released():
        fn_result = x.exp()
        fn_result.sum().backward(inputs=[x])
        x.grad = None
        spike()
        return fn_result

    assert split(released)[0] == {'temporaries': 4000}


def test_an_op_that_leaks_its_graph_is_seen():
    layer, losses = nn.Linear(50, 30), []

    def fn(detach):
        loss = layer(torch.randn(20, 50)).sum()
        losses[:] = [loss.detach() if detach else loss]
        del loss
        spike()

    assert split(lambda: fn(True))[0] == {'temporaries': 4}
    leak = {'temporaries': 4, 'saved activations': 20 * 50 * 4}
    assert split(lambda: fn(False))[0] == leak


def test_the_peak_may_be_the_op_whose_result_is_saved():
    x = torch.zeros(1000, requires_grad=True)
    assert measure_memory(lambda: x.exp()).kinds['saved activations'] == 4000
    assert measure_memory(lambda: x.add(1)).kinds['temporaries'] == 4000


def test_gradients_count_from_their_birth():
    weight = torch.zeros(1000, requires_grad=True)
    weight.register_hook(spike)

    def backward():
        (weight * 2).sum().backward()

    losses = 4 + 4  # and its gradient
    assert split(backward)[0] == {'gradients': 4000, 'temporaries': losses}
    weight.grad = None
    # What comes second is added to what is there.
    twice = split(lambda: (backward(), backward()))[0]
    assert twice == {'gradients': 4000, 'temporaries': 4000 + losses}


def test_a_gradient_that_dies_with_its_leaf():
    def fn():
        leaf = torch.zeros(1000, requires_grad=True)
        (leaf * 2).sum().backward()

    kinds = measure_memory(fn).kinds
    assert kinds['gradients'] == 4000
    assert kinds['temporaries'] == 4000 + 4 + 4


def test_work_on_a_finished_gradient_is_no_gradient():
    layer = nn.Linear(50, 30, bias=False)
    layer.weight.register_post_accumulate_grad_hook(lambda p: spike(p.grad * 2))
    x = torch.ones(1, 50)
    kinds, _ = split(lambda: layer(x).sum().backward())
    assert kinds['gradients'] == 50 * 30 * 4
    # The product, gradients of the output and of the loss, and the loss.
    assert kinds['temporaries'] == 50 * 30 * 4 + 4 + 4


def test_optimizer_state_belongs_to_its_parameter():
    layers = nn.Linear(50, 30), nn.Linear(30, 10)
    params = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.Adam(params)

    def step():
        layers[1](layers[0](torch.ones(1, 50))).sum().backward()
        optimizer.step()
        for param in params:
            param.grad = None
        spike()

    kinds, modules = split(step, groups=dict(first=layers[0], second=[layers[1]]))
    sizes = [2 * tensor_bytes(layer) + 2 * 4 for layer in layers]  # and two counters
    assert kinds == {'optimizer state': sum(sizes)}
    assert modules == dict(first=sizes[0], second=sizes[1])


# Learners.


def at(name, bank, micro_batch_size=None):
    """The split of a second step when a submodule of model or heads starts."""
    learner = build(4, bank=MemoryBank() if bank else None)
    learner.micro_batch_size = micro_batch_size
    optimizer = OPTIMIZERS['sgd'](all_params(learner))
    train_step(learner, optimizer, update_at_once(optimizer))
    root, _, path = name.partition('.')
    submodule = getattr(learner, root).get_submodule(path)
    submodule.register_forward_pre_hook(spike)
    return split(
        lambda: train_step(learner, optimizer, update_at_once(optimizer)),
        learner=learner,
    )


SAVED = {'saved activations': 2 * MAP + STATISTICS}  # of a convolution and its norm


@pytest.mark.parametrize('bank', [False, True])
@pytest.mark.parametrize(
    ('name', 'earlier', 'losses', 'saved', 'owners'),
    [
        ('model.stage3', 1, 2, {}, {'module2': MAP}),
        ('heads.2', 1, 2, SAVED, {'module2': MAP, 'module3': sum(SAVED.values())}),
        # No later head reads the bank.
        ('model.stage4', 0, 3, {}, {'module3': MAP}),
        (
            'model.classifier',
            0,
            3,
            SAVED,
            {'module3': MAP, 'module4': sum(SAVED.values())},
        ),
    ],
)
def test_a_learner_step(name, earlier, losses, saved, owners, bank):
    kinds, modules = at(name, bank)
    expected = {'boundaries': MAP, 'auxiliaries': 4 * losses, **saved}
    owners = {'auxiliaries': 4 * losses, **owners}
    if bank:
        moments = 2 * STATISTICS  # of the maps that were in it
        expected['bank'] = earlier * MAP + moments
        owners['bank'] = moments
    if bank and earlier:
        owners['module1'] = MAP
    assert kinds == expected
    assert modules == owners


def at_the_classifier(observed):
    """Kinds of an exact step when all modules have run without a graph."""
    learner = build(4)
    steps = ExactSteps(learner)

    def step():
        with steps.step(LABELS):
            loss = model_loss(learner.model)
        loss.backward()
        steps.replay()
        learner.model.zero_grad()

    step()
    learner.model.classifier.register_forward_pre_hook(spike)
    return split(step, learner=learner if observed else None)[0]


def test_an_exact_step_keeps_boundaries():
    assert at_the_classifier(True) == {'boundaries': 4 * MAP}
    assert 'boundaries' not in at_the_classifier(False)  # control


def test_the_output_that_micro_batches_put_together_is_a_boundary():
    kinds, modules = at('heads.2', bank=False, micro_batch_size=2)
    assert kinds['boundaries'] == 2 * MAP
    assert kinds['saved activations'] == MAP + STATISTICS  # of half the batch
    assert modules['module2'] == MAP + 4
    assert at('heads.2', bank=False)[0]['boundaries'] == MAP


def test_gradients_of_a_head_are_auxiliaries():
    learner = build(2)
    module, head = learner.modules[0], learner.heads[0]

    def step():
        with learner.step(LABELS, lambda loss, *_: spike(loss.backward())):
            model_loss(learner.model)
        learner.model.zero_grad()
        learner.heads.zero_grad()

    kinds, modules = split(step, learner=learner)
    assert kinds == {
        'gradients': tensor_bytes(module.params),
        'auxiliaries': tensor_bytes(head) + 4,
        'boundaries': MAP,  # the output, which is handed on next
    }
    assert modules == {
        'module1': kinds['gradients'] + MAP,
        'auxiliaries': kinds['auxiliaries'],
    }


def test_a_cut_that_does_not_detach_is_seen():
    def saved_by_module1(kind):
        learner = build(3, kind=kind)
        learner.model.stage3.register_forward_pre_hook(spike)

        def step():
            with learner.step(LABELS, retain):
                loss = model_loss(learner.model)
            loss.backward()
            learner.model.zero_grad()
            learner.heads.zero_grad()

        step()
        return split(step, learner=learner)[1].get('module1', 0)

    # What stays of a sound learner's module without an update: its gradients.
    sound = saved_by_module1(LocalLearner)
    assert saved_by_module1(LeakyLearner) - sound == 2 * MAP + STATISTICS
