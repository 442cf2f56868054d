"""Runs of a runner with a model split over processes: checkpoints, resuming, errors."""

import os

import pytest
import torch
from conftest import LOCAL_LEARNING, build_cifar_classifier, build_classifier
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from short_runs import build_runner, different, last_checkpoint, train
from test_distributed import in_processes

from man_mm import FullyShardedModel
from man_mm.engine.checks import check_model_wrapper, check_wrapper_type

GATHERING = dict(type='ShardingHook')
SGD = dict(type='SGD', lr=0.1)


def run(rank, world, folder):
    """Runs of the runner, with validation: sharded and not, resumed each by each."""
    os.environ['LOCAL_RANK'] = str(rank)
    settings = dict(iters=4, custom_hooks=[GATHERING], launcher='pytorch')
    kind = dict(type='MMDistributedDataParallel', device_ids=None)
    ddp = dict(settings, cfg=dict(model_wrapper_cfg=kind))
    kind = dict(type='man_mm.FullyShardedModel')
    sharded = dict(settings, cfg=dict(model_wrapper_cfg=kind))
    train(folder / 'ddp', **ddp)
    train(folder / 'sharded', **sharded)
    train(folder / 'resumed', stop=3, **sharded)
    train(folder / 'resumed', **sharded)
    train(folder / 'copied', stop=3, **sharded)
    train(folder / 'copied', **ddp)
    train(folder / 'alone', stop=3, **sharded)
    local_learning = dict(end_to_end_from=0.5)
    wrapper = dict(LOCAL_LEARNING, optimizer=SGD, local_learning=local_learning)
    train(folder / 'turned ddp', optim_wrapper=wrapper, **ddp)
    for stop in (1, 3, None):  # it turns behind the second iteration
        train(folder / 'turned', stop=stop, optim_wrapper=wrapper, **sharded)


def resume_on_four(rank, world, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    config = dict(model_wrapper_cfg=dict(type='FullyShardedModel'))
    settings = dict(iters=4, custom_hooks=[GATHERING], launcher='pytorch', cfg=config)
    runner = build_runner(folder / 'sharded', **settings)
    runner.train()  # resumes at the end, in four processes
    return runner.model.gather(runner.optim_wrapper, folder)


def test_checkpoints_and_resuming(tmp_path):
    in_processes(run, tmp_path, 2, tmp_path)
    whole = last_checkpoint(tmp_path / 'ddp')
    for name in ('sharded', 'resumed', 'copied'):
        other = last_checkpoint(tmp_path / name)
        for key in ('state_dict', 'optimizer', 'param_schedulers', 'man_mm'):
            assert not different(whole[key], other[key], key), name
    early = torch.load(tmp_path / 'sharded/iter_2.pth', weights_only=True)
    assert different(whole['state_dict'], early['state_dict'])  # control
    plain = build_cifar_classifier(8)
    assert list(plain.state_dict()) == list(whole['state_dict'])
    plain.load_state_dict(last_checkpoint(tmp_path / 'sharded')['state_dict'])
    sizes = [os.path.getsize(tmp_path / n / 'iter_4.pth') for n in ('ddp', 'sharded')]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)  # no hidden storage

    turned = [last_checkpoint(tmp_path / name) for name in ('turned ddp', 'turned')]
    for key in ('state_dict', 'optimizer'):
        assert not different(*(checkpoint[key] for checkpoint in turned), key)
    assert different(whole['state_dict'], turned[0]['state_dict'])  # control

    alone = build_runner(tmp_path / 'alone', iters=4, custom_hooks=[])
    alone.train()  # goes on in one process
    four = in_processes(resume_on_four, tmp_path, 4, tmp_path)[0]
    assert not different(whole['state_dict'], dict(four['state_dict']))
    assert not different(whole['optimizer'], four['optimizer'])


@HOOKS.register_module(force=True)
class RashHook(Hook):
    """Saves on rank 0 alone, as plain mmengine may."""

    def after_train_iter(self, runner, *args, **kwargs):
        runner.save_checkpoint(runner.work_dir, 'rash.pth', save_optimizer=False)


def errors(rank, world, folder):
    """What each configuration is told, on one process with the launcher."""
    os.environ['LOCAL_RANK'] = str(rank)
    stock = dict(type='OptimWrapper', optimizer=SGD)
    saving = dict(checkpoint=dict(type='SafeCheckpointHook'))
    plain = dict(
        checkpoint=dict(type='CheckpointHook'),
        memory_bank=dict(type='MemoryBankHook'),
    )
    no_bank = dict(
        LOCAL_LEARNING,
        optimizer=SGD,
        local_learning=dict(aux_head=dict(use_bank=False)),
    )
    cases = dict(
        average=dict(custom_hooks=[GATHERING, dict(type='EMAHook')]),
        compile=dict(cfg=dict(compile=True)),
        wrapper=dict(optim_wrapper=stock, default_hooks=saving),
        start=dict(optim_wrapper=no_bank, default_hooks=saving, custom_hooks=[]),
        start_with_bank=dict(custom_hooks=[]),
        plain=dict(default_hooks=plain),
        save=dict(custom_hooks=[GATHERING, dict(type='RashHook')]),
        size=dict(wrapper_cfg=dict(shard_size=2)),
        works={},
        works_without_bank=dict(
            optim_wrapper=no_bank,
            default_hooks=saving,
        ),
    )
    told = {}
    for name, changes in cases.items():
        kind = dict(changes.pop('wrapper_cfg', {}), type='FullyShardedModel')
        cfg = dict(changes.pop('cfg', {}), model_wrapper_cfg=kind)
        settings = dict(iters=1, custom_hooks=[GATHERING], launcher='pytorch', cfg=cfg)
        told[name] = ''
        try:
            train(folder / name, **{**settings, **changes})
        except (ValueError, RuntimeError) as error:
            told[name] = str(error)
    return told


def test_errors(tmp_path):
    (told,) = in_processes(errors, tmp_path, 1, tmp_path)
    assert 'remove EMAHook, or model_wrapper_cfg' in told['average']
    assert 'remove compile' in told['compile']
    assert "optim_wrapper.type='LocalLearningOptimWrapper'" in told['wrapper']
    for name in ('start', 'start_with_bank'):
        assert "dict(sharding=dict(type='ShardingHook'))" in told[name]
    assert "default_hooks.checkpoint.type='SafeCheckpointHook'" in told['plain']
    assert 'were not gathered for this checkpoint' in told['save']
    assert 'shard_size=2 must divide' in told['size']
    assert not told['works'] and not told['works_without_bank']  # control


def test_one_process_is_refused():
    with pytest.raises(ValueError, match='--launcher pytorch'):
        FullyShardedModel(build_classifier(18))


def test_other_wrappers_are_told_of_this_one():
    line = r"model_wrapper_cfg=dict\(type='FullyShardedModel'"
    with pytest.raises(ValueError, match=line):
        check_model_wrapper(torch.nn.DataParallel(build_classifier(18)))
    with pytest.raises(ValueError, match=line):
        check_wrapper_type('DeepSpeedOptimWrapper')
