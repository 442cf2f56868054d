"""A model split over processes trains and saves as one copied to each of them."""

import os

import pytest
import test_distributed
import torch
from conftest import LOCAL_LEARNING, build_classifier, build_wrapper, labelled_images
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS, OPTIMIZERS
from short_runs import build_runner, different, last_checkpoint, train
from test_distributed import in_processes, same, share, state

import man_mm
from man_mm.core.storages import tensor_bytes
from man_mm.engine import sharding
from man_mm.engine.checks import check_model_wrapper, check_wrapper_type

DDP = MMDistributedDataParallel
SHARDED = man_mm.ShardedModel
SHARDING = [dict(type='ShardingHook')]
ADAM = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
EXACT = {
    'module': {},
    'iteration': dict(
        update='iteration',
        optimizer=ADAM,
        recompute=['backbone.layer2', 'backbone.layer4'],
    ),
    'bfloat16': dict(amp=dict(dtype='bfloat16'), micro_batch_size=2),
    'float16': dict(amp=dict(dtype='float16', loss_scale=8.0)),
    'end to end': dict(
        partition=dict(type='CutPartition', cuts=[]),
        clip_grad=dict(type='value', clip_value=1e-3),
    ),
}
CLOSE = {
    'accumulated': dict(
        accumulate=2, optimizer=ADAM, clip_grad=dict(max_norm=1e-3, norm_type='inf')
    ),
    'clipped as one': dict(
        clip_grad=dict(max_norm=1e-2), clip='global', update='iteration'
    ),
}


@pytest.fixture(scope='module', autouse=True)
def imported():
    """Training once imports what each forked process would import by itself."""
    model = build_classifier(18)
    model.train_step(batches(1)[0], build_wrapper(model))


def batches(count=2):
    torch.manual_seed(7)
    return [labelled_images(8, 32) for _ in range(count)]


def train_steps(kind, rank, world, accumulate=1, amp=None, **options):
    """Trains on this rank's share; returns what it learned, and the moments."""
    model = build_classifier(18)
    if amp is None:
        model.double()
    wrapped = kind(model)
    wrapper = build_wrapper(wrapped, amp=amp, **options)
    wrapper._accumulative_counts = accumulate
    if kind is SHARDED:
        wrapped.shard(wrapper)
    predictions = []
    for batch in batches():
        mine = share(batch, rank, world)
        for part in range(accumulate):
            wrapped.train_step(share(mine, part, accumulate), wrapper)
        wrapped.eval()
        predictions += [p.pred_score for p in wrapped.val_step(mine)]
        wrapped.train()
    if kind is SHARDED:
        wrapped.gather()
        wrapper.sharding.gather_optimizer()
    states = wrapper.state_dict()['state']
    moments = [v for i in sorted(states) for v in states[i].values() if v is not None]
    return [t.clone() for t in (*state(model, wrapper), *predictions)], moments


def train_both(rank, world, cases):
    sharding._MESSAGE_BYTES = 2**16  # several messages a module
    return {
        name: [train_steps(kind, rank, world, **options) for kind in (DDP, SHARDED)]
        for name, options in cases.items()
    }


def test_equals_copies(tmp_path):
    rank0, rank1 = in_processes(train_both, tmp_path, 2, EXACT | CLOSE)
    for name in EXACT | CLOSE:
        (weights, moments), (sharded, sharded_moments) = rank0[name]
        learned = [t for t in moments if t.dim()]
        assert learned and all(t.any() for t in learned[-2:]), name
        if name in EXACT:
            assert same(weights, sharded), name
            assert same(moments, sharded_moments), name
        torch.testing.assert_close(sharded, weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sharded_moments, moments, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sharded[0], rank1[name][1][0][0], rtol=0, atol=0)
    plain, clipped = rank0['module'][1][0], rank0['clipped as one'][1][0]
    assert not same(plain, clipped)  # control: what is compared does something


def test_four_processes(tmp_path):
    cases = {'clipped': dict(optimizer=ADAM, clip_grad=dict(max_norm=1e-3))}
    for rank, results in enumerate(in_processes(train_both, tmp_path, 4, cases)):
        for (weights, moments), (sharded, sharded_moments) in results.values():
            torch.testing.assert_close(sharded, weights, rtol=1e-9, atol=1e-12)
            if rank == 0:  # the rank that saves
                torch.testing.assert_close(
                    sharded_moments, moments, rtol=1e-9, atol=1e-12
                )


def train_detector(rank, world):
    results = []
    for kind in (DDP, SHARDED):
        model = test_distributed.build('retinanet')
        wrapped = kind(model)
        wrapper = build_wrapper(wrapped)
        if kind is SHARDED:
            wrapped.shard(wrapper)
        for batch in test_distributed.batches('retinanet'):
            wrapped.train_step(share(batch, rank, world), wrapper)
        if kind is SHARDED:
            wrapped.gather()
        results.append([t.clone() for t in state(model, wrapper)])
    return results


def test_a_detector(tmp_path):
    """Its head is called by other names than ``forward``."""
    for copied, sharded in in_processes(train_detector, tmp_path, 2):
        assert same(copied, sharded)


def break_and_train(rank, world):
    """What comes of it without a sum over ranks, of norms and then of gradients."""
    case = dict(clip_grad=dict(max_norm=1e-3, norm_type='inf'))
    results = [train_steps(SHARDED, rank, world, **case)[0]]
    sharding.total_norm = lambda grads, _type: max(g.abs().max() for g in grads)
    results.append(train_steps(SHARDED, rank, world, **case)[0])
    sharding.reduce_scatter = lambda x: (x.chunk(world)[rank] * world, Done())
    results.append(train_steps(SHARDED, rank, world)[0])
    return [*results, train_steps(DDP, rank, world)[0]]


class Done:
    def wait(self):
        pass


def test_control_without_sums(tmp_path):
    for clipped, own_norms, own_gradients, averaged in in_processes(
        break_and_train, tmp_path, 2
    ):
        assert not same(clipped, own_norms)
        assert not same(averaged, own_gradients)


def count_bytes(rank, world, kind):
    """Bytes of weights, gradients and optimizer state, before the weights are moved."""
    model = build_classifier(18)
    wrapped = kind(model)
    wrapper = build_wrapper(wrapped, update='iteration', optimizer=ADAM)
    if kind is SHARDED:
        wrapped.shard(wrapper)
    optimizer = wrapper.optimizer
    params = [p for group in optimizer.param_groups for p in group['params']]
    counts = {}

    def count(*_):
        grads = [p.grad for p in params if p.grad is not None]
        counts['grads'] = tensor_bytes(grads)

    optimizer.register_step_pre_hook(count)
    wrapped.train_step(share(batches(1)[0], rank, world), wrapper)
    heads = wrapper.learner.heads.parameters()
    counts['weights'] = tensor_bytes([*model.parameters(), *heads, *params])
    counts['state'] = tensor_bytes(optimizer)
    return counts


@pytest.mark.parametrize('world', [2, 4])
def test_a_rank_has_its_part(tmp_path, world):
    (copied, *_) = in_processes(count_bytes, tmp_path, world, DDP)
    for sharded in in_processes(count_bytes, tmp_path, world, SHARDED):
        for name, nbytes in copied.items():
            assert sharded[name] == pytest.approx(nbytes / world, rel=0.02), name


def weights_in_memory(rank, world):
    """Which modules have their weights while each of them runs."""
    model = build_classifier(18)
    wrapped = SHARDED(model)
    wrapper = build_wrapper(wrapped)
    wrapped.shard(wrapper)
    modules = wrapper.learner.modules
    seen = []

    def look(*_):
        seen.append([
            any(p.untyped_storage().nbytes() == p.nbytes for p in m.params if p.dim())
            for m in modules[:-1]
        ])  # fmt: skip

    for module in modules:
        first = model.get_submodule(module.units[0].name)
        first.register_forward_pre_hook(look)
    wrapped.train_step(share(batches(1)[0], rank, world), wrapper)
    return seen


def test_one_module_has_its_weights(tmp_path):
    for seen in in_processes(weights_in_memory, tmp_path, 2):
        assert seen == [[i == j for i in range(3)] for j in range(4)]


def run(rank, world, folder):
    """Runs of the runner, with validation: sharded and not, resumed each by each."""
    os.environ['LOCAL_RANK'] = str(rank)
    ddp = dict(iters=4, custom_hooks=SHARDING, launcher='pytorch')
    config = dict(model_wrapper_cfg=dict(type='man_mm.ShardedModel'))
    sharded = dict(ddp, cfg=config)
    train(folder / 'ddp', **ddp)
    train(folder / 'sharded', **sharded)
    train(folder / 'resumed', stop=3, **sharded)
    train(folder / 'resumed', **sharded)
    train(folder / 'copied', stop=3, **sharded)
    train(folder / 'copied', **ddp)


def test_checkpoints_and_resuming(tmp_path):
    in_processes(run, tmp_path, 2, tmp_path)
    whole = last_checkpoint(tmp_path / 'ddp')
    for name in ('sharded', 'resumed', 'copied'):
        other = last_checkpoint(tmp_path / name)
        for key in ('state_dict', 'optimizer', 'param_schedulers', 'man_mm'):
            assert not different(whole[key], other[key], key), name
    early = torch.load(tmp_path / 'sharded/iter_2.pth', weights_only=True)
    assert different(whole['state_dict'], early['state_dict'])  # control
    sizes = [os.path.getsize(tmp_path / n / 'iter_4.pth') for n in ('ddp', 'sharded')]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)  # no hidden storage
    alone = build_runner(tmp_path / 'sharded', iters=4, custom_hooks=[])
    alone.train()  # resumes at the end, in one process
    assert not different(whole['state_dict'], alone.model.state_dict())
    assert not different(whole['optimizer'], alone.optim_wrapper.state_dict())


@OPTIMIZERS.register_module(force=True)
class WholeSGD(torch.optim.SGD):
    """Stands for those that scale by the norm of a parameter."""


def errors(rank, world, folder):
    """What each configuration is told, on one process with the launcher."""
    os.environ['LOCAL_RANK'] = str(rank)
    whole = dict(LOCAL_LEARNING, optimizer=dict(type='WholeSGD', lr=0.1))
    stock = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    without = dict(checkpoint=dict(type='CheckpointHook'))
    no_bank = dict(use_bank=False)
    no_bank = dict(
        LOCAL_LEARNING,
        optimizer=dict(type='SGD', lr=0.1),
        local_learning=dict(aux_head=no_bank),
    )
    cases = dict(
        average=dict(custom_hooks=[dict(type='EMAHook'), *SHARDING]),
        compile=dict(cfg=dict(compile=True)),
        optimizer=dict(optim_wrapper=whole),
        wrapper=dict(optim_wrapper=stock, default_hooks=without),
        start=dict(optim_wrapper=no_bank, default_hooks=without, custom_hooks=[]),
        save=dict(custom_hooks=[dict(type='RashHook'), *SHARDING]),
        works={},
    )
    told = {}
    for name, changes in cases.items():
        cfg = dict(changes.pop('cfg', {}), model_wrapper_cfg=dict(type='ShardedModel'))
        settings = dict(iters=1, custom_hooks=SHARDING, launcher='pytorch', cfg=cfg)
        told[name] = ''
        try:
            train(folder / name, **{**settings, **changes})
        except (ValueError, RuntimeError) as error:
            told[name] = str(error)
    return told


@HOOKS.register_module(force=True)
class RashHook(Hook):
    """Saves on rank 0 alone, as plain mmengine may."""

    def after_train_iter(self, runner, *args, **kwargs):
        runner.save_checkpoint(runner.work_dir, 'rash.pth', save_optimizer=False)


def test_errors(tmp_path):
    (told,) = in_processes(errors, tmp_path, 1, tmp_path)
    assert 'remove EMAHook, or model_wrapper_cfg' in told['average']
    assert 'remove compile' in told['compile']
    assert "'WholeSGD' may need whole parameters" in told['optimizer']
    assert "optim_wrapper.type='LocalLearningOptimWrapper'" in told['wrapper']
    assert "dict(sharding=dict(type='ShardingHook'))" in told['start']
    assert 'were not gathered for this checkpoint' in told['save']
    assert not told['works']  # control


def test_other_wrappers_are_told_of_this_one():
    with pytest.raises(ValueError, match=r"model_wrapper_cfg=dict\(type='ShardedModel"):
        check_model_wrapper(torch.nn.DataParallel(build_classifier(18)))
    with pytest.raises(ValueError, match='ShardedModel'):
        check_wrapper_type('DeepSpeedOptimWrapper')
