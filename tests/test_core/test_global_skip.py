"""What is in front of the first unit, where a global skip reads it behind the last."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import (
    IMAGES,
    LABELS,
    LeakyLearner,
    PooledHead,
    all_params,
    build_global_skip,
    count_hooks,
    retain,
)

from man_mm.core import LocalLearner, MemoryBank
from man_mm.core.entry import Entry

torch.set_num_threads(1)


def compute_grads(learner):
    with learner.step(LABELS):
        loss = F.cross_entropy(learner.model(IMAGES.double()), LABELS)
    loss.backward()
    return [param.grad for param in all_params(learner)]


def grads_by_hand(learner, parts=('first', 'last')):
    """All boundaries are detached but that of the front, which two losses reach."""
    model, losses = learner.model, []
    x = shallow = model.front(IMAGES.double())
    for block, head in zip(model.body, learner.heads, strict=False):
        x = block(x)
        maps = {} if learner.bank is None else {'entry': shallow.detach()}
        losses.append(head({**maps, 'own': x}, LABELS, None))
        x = x.detach()
    final = model.tail(model.body[-1](x), shallow)
    losses.append(F.cross_entropy(final, LABELS))
    both = dict(first=losses[0], last=losses[-1])
    front, others = all_params(learner)[:2], all_params(learner)[2:]
    of_front = sum(both[part] for part in parts)
    return [
        *torch.autograd.grad(of_front, front, retain_graph=True),
        *torch.autograd.grad(sum(losses), others),
    ]


def check_close(grads, others):
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('bank', [None, MemoryBank])
@pytest.mark.parametrize('depth', [2, 3, 4])
def test_the_front_gets_both_gradients(depth, bank):
    def run(grads):
        return grads(build_global_skip(depth, bank=bank and bank()))

    grads = run(compute_grads)
    check_close(grads, run(grads_by_hand))
    for part in ('first', 'last'):  # controls
        with pytest.raises(AssertionError):
            check_close(grads, run(partial(grads_by_hand, parts=[part])))


class DetachingLearner(LocalLearner):
    """Negative control: the front gets the gradient of the last module alone."""

    def _enter(self, submodule, args):
        return args[0].detach(), *args[1:]


class JoinedLearner(LocalLearner):
    """Negative control: module 1 and the last one share a graph."""

    def _enter(self, submodule, args):
        return args


def test_a_front_that_is_detached_or_joined_is_found():
    learner = build_global_skip(kind=DetachingLearner)
    grads = compute_grads(learner)
    check_close(grads, grads_by_hand(learner, parts=['last']))
    with pytest.raises(AssertionError):
        check_close(grads, grads_by_hand(learner))
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        compute_grads(build_global_skip(kind=JoinedLearner))


def reached(learner):
    """The parameters that got a gradient by the end of each backward pass."""
    params, found = all_params(learner), []

    def collect():
        found.append({id(p) for p in params if p.grad is not None})
        for param in params:
            param.grad = None

    def backward(loss, module, complete):
        retain(loss, module, complete)
        collect()

    with learner.step(LABELS, backward):
        loss = F.cross_entropy(learner.model(IMAGES.double()), LABELS)
    loss.backward()
    collect()
    return found


@pytest.mark.parametrize('bank', [None, MemoryBank])
def test_each_loss_reaches_its_own_module_and_the_last_the_front(bank):
    def check(learner):
        owned = [{id(p) for p in learner.params(module)} for module in learner.modules]
        assert all(id(p) in owned[-1] for p in learner.model.front.parameters())
        assert reached(learner) == owned

    check(build_global_skip(bank=bank and bank()))
    with pytest.raises(AssertionError):
        check(build_global_skip(bank=bank and bank(), kind=LeakyLearner))


def enlarged(index):
    """Gradients with one local loss ten times as large."""
    learner = build_global_skip(4)
    forward = learner.heads[index].forward
    learner.heads[index].forward = lambda *args: 10 * forward(*args)
    return compute_grads(learner)


def test_of_the_local_losses_only_the_first_reaches_the_front():
    names = [name for name, _ in build_global_skip(4).model.named_parameters()]
    grads = dict(zip(names, compute_grads(build_global_skip(4)), strict=False))
    for index in range(3):
        others = dict(zip(names, enlarged(index), strict=False))
        changed = [name for name in names if not torch.equal(grads[name], others[name])]
        own = (f'body.{index}.', 'front.') if index == 0 else f'body.{index}.'
        assert changed == [name for name in names if name.startswith(own)]


def spoiled(index):
    """Gradients with one local loss that is infinite."""
    learner = build_global_skip()
    forward = learner.heads[index].forward
    learner.heads[index].forward = lambda *args: torch.inf * forward(*args)
    return compute_grads(learner)


def test_the_front_leaves_out_a_first_gradient_that_is_not_finite(monkeypatch):
    last = grads_by_hand(build_global_skip(), parts=['last'])[:2]
    check_close(spoiled(0)[:2], last)
    check_close(spoiled(1)[:2], compute_grads(build_global_skip())[:2])
    monkeypatch.setattr(Entry, '_admit', lambda self, grad: None)  # control
    assert not any(grad.isfinite().all() for grad in spoiled(0)[:2])


@pytest.mark.parametrize('frozen', [False, True])
def test_a_front_without_a_skip_is_an_error(frozen):
    learner = build_global_skip()
    model = learner.model
    model.front.bias.requires_grad_(not frozen)
    compute_grads(learner)
    learner.entry.check()  # control: trained
    model.tail = lambda x, _shallow: model.classifier(x.mean((2, 3)))
    compute_grads(learner)
    names = 'front.weight' if frozen else 'front.weight, front.bias'
    with pytest.raises(RuntimeError, match=f"^{names}: in front of .*'body.0'"):
        learner.entry.check()
    model.front.requires_grad_(False)
    compute_grads(learner)
    learner.entry.check()


def test_a_frozen_front_stays_out():
    learner = build_global_skip()
    learner.model.front.requires_grad_(False)
    expected = compute_grads(build_global_skip())
    grads = compute_grads(learner)
    assert grads[:2] == [None, None]
    check_close(grads[2:], expected[2:])


@pytest.mark.parametrize('reads', [True, False])
def test_the_bank_holds_what_enters_only_while_a_later_head_reads_it(reads):
    bank, held, entered = MemoryBank(), [], []
    learner = build_global_skip(4, bank=bank)
    model = learner.model
    for index, head in enumerate(learner.heads):
        if not reads or index == 2:  # this one reads nothing but its own map
            head.__class__, head.reads = PooledHead, frozenset()
            head.classifier = torch.nn.Linear(4, 3).double()
    hooks = [model.front.register_forward_hook(lambda *args: entered.append(args[-1]))]
    for block in model.body:
        hook = block.register_forward_hook(lambda *_: held.append(dict(bank)))
        hooks.append(hook)
    compute_grads(learner)
    for hook in hooks:
        hook.remove()
    # Hooks that are older than those of the step run first.
    assert [list(maps) for maps in held] == [['entry'] * reads] * 2 + [[], []]
    for maps in held[:2] if reads else []:
        assert torch.equal(maps['entry'], entered[0])  # as it was, and no copy
        assert maps['entry'].data_ptr() == entered[0].data_ptr()
        assert maps['entry'].grad_fn is None and not maps['entry'].requires_grad
    assert not bank and (bank.statistics('entry') is not None) == reads
    assert count_hooks(model) == 0
