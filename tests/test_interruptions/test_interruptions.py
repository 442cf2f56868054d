"""Runs that stop at any place end bitwise where uninterrupted ones end."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LOCAL_LEARNING
from mmengine.hooks import Hook
from short_runs import build_runner, differences, different, last_checkpoint, train

from man_mm.interruptions import random_state, resume_hook
from man_mm.interruptions.plain_data import from_plain_data

EPOCHS = dict(epochs=3)  # of three iterations
ITERS = dict(iters=6)
WORKERS = dict(workers=2)
BY_EPOCH = dict(by_epoch=True, filename_tmpl='epoch_{}.pth')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """What uninterrupted runs end with."""
    folder = tmp_path_factory.mktemp('whole')
    return {key: train(folder / key, **run) for key, run in RUNS.items()}


RUNS = {
    'epochs': EPOCHS,
    'iters': ITERS,
    'epochs-workers': {**EPOCHS, **WORKERS},
}


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


def _forget(self, runner, checkpoint):
    from_plain_data(checkpoint)


@pytest.mark.parametrize(
    'run, owner, name, value',
    [
        ('epochs', resume_hook.ResumeHook, 'after_load_checkpoint', _forget),
        ('epochs', resume_hook, '_skip', lambda loop, batches, state: None),
        ('epochs-workers', resume_hook, 'restart_workers', lambda loader, epoch: None),
    ],
)
def test_controls(run, owner, name, value, whole, tmp_path, monkeypatch):
    """Without any of its parts a resumed run ends elsewhere."""
    train(tmp_path, stop=5, **RUNS[run])
    monkeypatch.setattr(owner, name, value)
    try:
        resumed = train(tmp_path, **RUNS[run])
    except AssertionError:  # an epoch that starts again runs over the end
        return
    assert differences(whole[run], resumed)


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
            monkeypatch.setattr(resume_hook, '_is_validation_due', lambda *args: False)
        resumed = train(work_dir, **run)
        # The scheduler waits for the metric, which is known from validation only.
        different = differences(whole, resumed)
        assert any('param_schedulers' in key for key in different) == control
        assert control or different == []


def test_a_finished_run_is_not_validated_again(tmp_path, monkeypatch):
    whole = train(tmp_path, **ITERS)
    monkeypatch.setattr(
        resume_hook,
        'set_random_state',
        lambda state: pytest.fail('nothing is left to do'),
    )
    assert differences(whole, train(tmp_path, **ITERS)) == []


def test_without_a_seed(tmp_path):
    """The data order follows the seed in the checkpoint, which is known late."""
    # As a run that ended: the same seed is what an uninterrupted run has.
    stopped = train(tmp_path / 'stopped', stop=4, randomness=dict(seed=None), **EPOCHS)
    resumed = train(tmp_path / 'stopped', randomness=dict(seed=None), **EPOCHS)
    seed = stopped['meta']['seed']
    assert resumed['meta']['seed'] == seed
    # Weights are the same before the first step, whatever the seed.
    whole = train(tmp_path / 'whole', randomness=dict(seed=seed), **EPOCHS)
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
        warnings = []
        runner.logger.warning = warnings.append
        runner.train()
        told = [w for w in warnings if 'multiple of optim_wrapper.accumulat' in w]
        assert bool(told) == (interval == 1)


@pytest.mark.parametrize('workers, persistent', [(0, False), (1, False), (1, True)])
def test_which_workers_restart(workers, persistent):
    loader = torch.utils.data.DataLoader(
        [1, 2],
        num_workers=workers,
        persistent_workers=persistent,
        worker_init_fn=torch.manual_seed,
    )
    for epoch in range(3):
        random_state.restart_workers(loader, epoch)
        changed = loader.worker_init_fn is not torch.manual_seed
        assert changed == (persistent and epoch > 0)
    if persistent:
        # The seed differs from epoch to epoch, and wraps the user's function once.
        assert loader.worker_init_fn.args == (torch.manual_seed, 2)


def rank(index, port, folder):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE='2'
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=120))
    run = dict(EPOCHS, randomness=dict(seed=0, diff_rank_seed=True))
    train(Path(folder, 'whole'), **run)
    for name in ('stopped', 'control'):
        if name == 'control':  # rank 0's state alone is saved
            resume_hook.ResumeHook.gather_state = lambda self, runner: None
        train(Path(folder, name), stop=3, **run)
        train(Path(folder, name), **run)
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(rank, (29541, str(tmp_path)), nprocs=2)
    whole = last_checkpoint(tmp_path / 'whole')
    ranks = [state['now'] for state in whole['man_mm']['ranks']]
    assert different(*ranks)  # so that one state would not do for both
    assert differences(whole, last_checkpoint(tmp_path / 'stopped')) == []
    control = last_checkpoint(tmp_path / 'control')
    assert different(whole['state_dict'], control['state_dict'])


def test_another_number_of_processes_is_told(tmp_path):
    train(tmp_path, stop=2, **ITERS)
    path = tmp_path / 'iter_2.pth'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['man_mm']['ranks'] *= 2
    torch.save(checkpoint, path)
    runner = build_runner(tmp_path, **ITERS)
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    assert any('random state for each of the 1 processes' in w for w in warnings)


def test_validation_alone(tmp_path):
    """The hooks stay out of a run that does not train."""
    options = dict(custom_hooks=[], checkpoint=dict(save_best=None))
    metrics = build_runner(tmp_path, **options, **ITERS).val()
    assert set(metrics) == {'noise'} and not list(tmp_path.glob('*.pth'))
