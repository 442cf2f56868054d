"""Runs that stop at any place end bitwise where uninterrupted ones end."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LOCAL_LEARNING
from mmengine.hooks import Hook
from short_runs import (
    build_runner,
    differences,
    different,
    last_checkpoint,
    train,
    warnings_of,
)

from man_mm.interruptions import resume_hook

RUNS = {
    'epochs': dict(epochs=3),  # of three iterations
    'iters': dict(iters=6),
    'epochs-workers': dict(epochs=3, workers=2),
}
EPOCHS, ITERS = RUNS['epochs'], RUNS['iters']
BY_EPOCH = dict(by_epoch=True, filename_tmpl='epoch_{}.pth')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """What uninterrupted runs end with."""
    folder = tmp_path_factory.mktemp('whole')
    return {key: train(folder / key, **run) for key, run in RUNS.items()}


@pytest.mark.parametrize(
    'run, stop',
    [
        ('epochs', 1),
        ('epochs', 3),  # an epoch's last iteration, before its validation
        ('epochs', 5),
        ('iters', 1),
        ('iters', 4),  # before a validation
        ('epochs-workers', 3),
        ('epochs-workers', 5),  # the workers have outlived an epoch
    ],
)
def test_resume_is_bitwise(run, stop, whole, tmp_path):
    stopped = train(tmp_path, stop=stop, **RUNS[run])
    assert stopped['meta']['iter'] == stop
    assert differences(whole[run], stopped)  # control
    assert differences(whole[run], train(tmp_path, **RUNS[run])) == []


def test_saved_by_epoch(tmp_path):
    run = dict(EPOCHS, checkpoint=BY_EPOCH)
    whole = train(tmp_path / 'whole', **run)
    train(tmp_path / 'stopped', stop=8, **run)
    assert differences(whole, train(tmp_path / 'stopped', **run)) == []


@pytest.mark.parametrize(
    'run, part',
    [
        ('epochs', 'seed'),
        ('epochs', '_pass_over'),
        ('epochs-workers', '_restart_workers'),
    ],
)
def test_controls(run, part, tmp_path, monkeypatch):
    """Without any of its parts a resumed run ends elsewhere."""
    monkeypatch.setattr(resume_hook, part, lambda *args: None)
    whole = train(tmp_path / 'whole', **RUNS[run])
    train(tmp_path / 'stopped', stop=5, **RUNS[run])
    try:
        resumed = train(tmp_path / 'stopped', **RUNS[run])
    except AssertionError:  # an epoch that starts again runs over the end
        return
    assert differences(whole, resumed)


class DieInValidation(Hook):
    def before_val_epoch(self, runner):
        raise KeyboardInterrupt


@pytest.mark.parametrize('run', [dict(epochs=2, checkpoint=BY_EPOCH), dict(iters=4)])
def test_a_validation_that_was_cut_off_is_repeated(run, tmp_path, monkeypatch):
    whole = train(tmp_path / 'whole', **run)
    for control in (False, True):
        work_dir = tmp_path / f'stopped{control}'
        hooks = [dict(type='EMAHook'), DieInValidation()]
        train(work_dir, custom_hooks=hooks, **run)
        if control:
            monkeypatch.setattr(resume_hook, '_is_validation_due', lambda runner: False)
        resumed = train(work_dir, **run)
        # The scheduler waits for the metric, which is known from validation only.
        different = differences(whole, resumed)
        assert any('param_schedulers' in key for key in different) == control
        assert control or different == []


def test_the_last_validation_is_repeated_if_it_was_cut_off(tmp_path):
    run = dict(epochs=1, checkpoint=BY_EPOCH)
    whole = train(tmp_path / 'whole', **run)
    train(
        tmp_path / 'stopped',
        custom_hooks=[dict(type='EMAHook'), DieInValidation()], **run,
    )  # fmt: skip
    assert differences(whole, train(tmp_path / 'stopped', **run)) == []


def test_a_finished_run_is_not_validated_again(tmp_path):
    whole = train(tmp_path, **ITERS)
    again = train(tmp_path, custom_hooks=[DieInValidation()], **ITERS)
    assert differences(whole, again) == []


def test_without_a_seed(tmp_path):
    """The data order follows the seed in the checkpoint, which is known late."""
    # As a run that ended: the same seed is what an uninterrupted run has.
    for run in (EPOCHS, ITERS):
        work_dir = tmp_path / next(iter(run))
        stopped = train(work_dir, 4, randomness=dict(seed=None), **run)
        resumed = train(work_dir, randomness=dict(seed=None), **run)
        seed = stopped['meta']['seed']
        assert resumed['meta']['seed'] == seed
        # Weights are the same before the first step, whatever the seed.
        whole = train(tmp_path / f'whole-{seed}', randomness=dict(seed=seed), **run)
        assert differences(whole, resumed) == []


def test_a_checkpoint_between_two_updates_is_told(tmp_path):
    wrapper = dict(LOCAL_LEARNING, optimizer=dict(type='SGD', lr=1e-3))
    for interval in (1, 2):
        runner = build_runner(
            tmp_path / str(interval),
            optim_wrapper=dict(wrapper, accumulative_counts=2),
            checkpoint=dict(interval=interval),
            **ITERS,
        )
        warnings = warnings_of(runner)
        runner.train()
        told = [w for w in warnings if 'multiple of optim_wrapper.accumulat' in w]
        assert bool(told) == (interval == 1)


def rank(index, port, folder):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE='2'
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=120))
    train(Path(folder, 'whole'), **EPOCHS)
    resume_hook.seed(build_runner(Path(folder, 'seed'), **EPOCHS), 0)
    torch.save(torch.rand(9), Path(folder, f'{index}.pth'))
    for name in ('stopped', 'control'):
        if name == 'control':
            resume_hook.seed = lambda runner, iteration: None
        train(Path(folder, name), stop=3, **EPOCHS)
        train(Path(folder, name), **EPOCHS)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(rank, (29541, str(tmp_path)), nprocs=2)
    whole = last_checkpoint(tmp_path / 'whole')
    assert differences(whole, last_checkpoint(tmp_path / 'stopped')) == []
    assert differences(whole, last_checkpoint(tmp_path / 'control'))
    # Each rank draws numbers of its own.
    assert not torch.equal(*(torch.load(tmp_path / f'{i}.pth') for i in range(2)))


def test_another_number_of_processes_is_told(tmp_path):
    train(tmp_path, stop=2, **ITERS)
    path = tmp_path / 'iter_2.pth'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['man_mm']['processes'] = 2
    torch.save(checkpoint, path)
    runner = build_runner(tmp_path, **ITERS)
    warnings = warnings_of(runner)
    runner.train()
    assert any('not one of ResumeHook with 1 processes' in w for w in warnings)


def test_validation_alone(tmp_path):
    """The hooks stay out of a run that does not train."""
    options = dict(custom_hooks=[], checkpoint=dict(save_best=None))
    metrics = build_runner(tmp_path, **options, **ITERS).val()
    assert set(metrics) == {'noise'} and not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('run', [EPOCHS, dict(ITERS, workers=1)])
def test_plain_resuming(run, tmp_path):
    """With mmengine's hooks alone: weights, heads, optimizer and bank come back."""
    hooks = dict(
        checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False),
        memory_bank=dict(type='MemoryBankHook'),
    )
    run = dict(run, default_hooks=hooks)
    stopped = train(tmp_path, stop=4, **run)
    assert stopped['meta']['iter'] == 3 and 'man_mm' not in stopped

    class Look(Hook):
        def before_train(self, runner):
            optimizer = runner.optim_wrapper.state_dict()
            assert different(stopped['optimizer'], optimizer) == []
            assert different(stopped['state_dict'], runner.model.state_dict()) == []

    resumed = train(tmp_path, custom_hooks=[Look()], **run)
    assert resumed['meta']['iter'] > 3
    assert different(stopped['state_dict'], resumed['state_dict'])  # control
    assert 'moments' in resumed['optimizer']['local_learning']['bank']
