"""Exact and joint steps of a model that is split over processes by FSDP2."""

from functools import partial

import pytest
import test_distributed
import torch
from conftest import (
    build_classifier,
    build_restorer,
    build_wrapper,
    image_pairs,
    labelled_images,
)
from short_runs import different
from test_distributed import in_processes, share
from test_end_to_end_steps import build_small_detector, build_swin
from test_fully_sharded import DDP, batches, train_both, train_steps

from man_mm import FullyShardedModel
from man_mm.engine.distributed import is_sharded

ADAM = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
CASES = {
    'local': dict(optimizer=ADAM),
    'exact': dict(end_to_end_from=0, optimizer=ADAM),
    'joint': dict(
        end_to_end_from=0, local_loss_weight=0.1, micro_batch_size=2, optimizer=ADAM
    ),
    'turned to exact': dict(end_to_end_from=0.5, optimizer=ADAM),
    'turned to joint': dict(
        end_to_end_from=0.5, local_loss_weight=0.1, update='iteration', optimizer=ADAM
    ),
    'exact in float16': dict(
        end_to_end_from=0, amp=dict(dtype='float16', loss_scale=8.0)
    ),
}


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Training once imports what each forked process would import by itself."""
    model = build_classifier(18)
    model.train_step(batches(1)[0], build_wrapper(model))


def test_equals_data_parallel(tmp_path):
    rank0, _ = in_processes(train_both, tmp_path, 2, CASES)
    for name, (copied, sharded) in rank0.items():
        assert not different(copied, sharded, name)
    learned = [sharded[0] for _, sharded in rank0.values()]
    for index, weights in enumerate(learned):  # control: each is another training
        assert all(different(weights, other) for other in learned[:index])


def build_detector():
    return test_distributed.build('retinanet')


def images(side):
    torch.manual_seed(7)
    return [labelled_images(4, side) for _ in range(2)]


def pairs():
    return [image_pairs(size=4, seed=seed) for seed in range(2)]


def boxes():
    return test_distributed.batches('retinanet')


EXACT, JOINT = dict(end_to_end_from=0), CASES['joint'] | dict(micro_batch_size=None)
# Swin has operations between its units; other units of the detectors are frozen, or
# read by a neck; a global skip of EDSR leads around its units.
OTHERS = {
    'swin': (build_swin, partial(images, 64), EXACT),
    'frozen': (partial(build_small_detector, 'retinanet'), boxes, EXACT),
    'retinanet': (build_detector, boxes, EXACT),
    'edsr': (lambda: build_restorer('edsr').double(), pairs, EXACT),
    'joint edsr': (lambda: build_restorer('edsr').double(), pairs, JOINT),
}


def train_other(rank, world, name, kinds=(DDP, FullyShardedModel)):
    build, load, options = OTHERS[name]
    return [
        train_steps(kind, rank, world, build(), load(), **options) for kind in kinds
    ]


@pytest.mark.parametrize('name', OTHERS)
def test_other_models(tmp_path, name):
    rank0, _ = in_processes(train_other, tmp_path, 2, name)
    copied, sharded = rank0
    rtol = 1e-5 if name == 'retinanet' else 1e-9
    torch.testing.assert_close(sharded, copied, rtol=rtol, atol=rtol)


class WithoutEnd(FullyShardedModel):
    """Waits for FSDP to notice by itself that a backward pass has ended."""

    def shard(self, learner):
        super().shard(learner)
        self.reducing = torch.nn.Identity()


def train_without_end(rank, world):
    return train_other(rank, world, 'edsr', (FullyShardedModel, WithoutEnd))


def test_control_gradients_in_front_that_are_not_reduced(tmp_path):
    right, wrong = in_processes(train_without_end, tmp_path, 2)[0]
    assert '.generator.conv_first.weight' in different(right[0], wrong[0])


def follow(rank, world, weight, again):
    """Modules that have their weights, whenever one runs in an exact step."""
    model = build_classifier(18)
    wrapped = FullyShardedModel(model)
    wrapper = build_wrapper(
        wrapped,
        end_to_end_from=0,
        local_loss_weight=weight,
        recompute_last_module=again,
    )
    starts = [model.get_submodule(m.parts[0]) for m in wrapper.learner.modules]
    seen = []

    def look(*_):
        seen.append([not is_sharded(next(start.parameters())) for start in starts])

    for start in starts:
        start.register_forward_pre_hook(look)
    model.head.register_forward_pre_hook(look)
    model.head.register_full_backward_hook(look)
    wrapped.train_step(share(labelled_images(8, 32), rank, world), wrapper)
    params = [*model.parameters(), *wrapper.learner.heads.parameters()]
    assert all(map(is_sharded, params))
    return seen


@pytest.mark.parametrize('again', [True, False])
@pytest.mark.parametrize('weight', [0.0, 0.1])
def test_one_module_has_its_weights(tmp_path, weight, again):
    only = [[i == j for i in range(4)] for j in range(4)]
    behind, replayed = [False] * 4, only
    if not again:  # the last module waits for the gradient of what is behind
        behind, replayed = only[-1], only[:-1]
    for seen in in_processes(follow, tmp_path, 2, weight, again):
        assert seen == [*only, behind, behind, *reversed(replayed)]


def turn(rank, world, weight):
    """Bytes of this process's parts of the heads, before and after the change."""
    wrapped = FullyShardedModel(build_classifier(18))
    wrapped.can_save = True
    options = dict(end_to_end_from=0.5, local_loss_weight=weight, optimizer=ADAM)
    wrapper = build_wrapper(wrapped, **options)
    wrapper.initialize_count_status(wrapped, 0, 4)
    heads = list(wrapper.learner.heads.parameters())
    counts = []
    for batch in batches(4):
        wrapped.train_step(share(batch, rank, world), wrapper)
        storages = [head.to_local().untyped_storage() for head in heads]
        stepped = sum(head in wrapper.optimizer.state for head in heads)
        counts.append((sum(s.nbytes() for s in storages), stepped, len(wrapped.heads)))
    return counts


def test_the_change_to_exact_steps_frees_the_heads(tmp_path):
    for first, second, *others in in_processes(turn, tmp_path, 2, 0.0):
        assert first == second and all(first)
        assert others == [(0, 0, 0)] * 2


def test_control_joint_steps_keep_the_heads(tmp_path):
    for counts in in_processes(turn, tmp_path, 2, 0.1):
        assert len(set(counts)) == 1 and all(counts[0])
