"""Saving: atomic, and safe on full disks and in folders without access."""

import errno
import io
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import checkpoint
from short_runs import (
    build_runner,
    differences,
    different,
    last_checkpoint,
    train,
    warnings_of,
)

from man_mm.interruptions import files
from man_mm.interruptions.files import write_atomically

ITERS = 4


class FullDiskHook(Hook):
    """Lets the temporary file of a save end on a full device."""

    priority = 'HIGHEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            Path(runner.work_dir, 'unfinished.tmp').symlink_to('/dev/full')


def train_on_full_disk(work_dir, iteration, **overrides):
    runner = build_runner(work_dir, iters=ITERS, **overrides)
    runner.register_hook(FullDiskHook(iteration))
    errors = warnings_of(runner, 'error')
    try:
        runner.train()
    finally:
        runner.logger.__dict__.pop('error')
    return errors


def test_training_goes_on_after_a_failed_save(tmp_path):
    whole = train(tmp_path / 'whole', iters=ITERS)
    work_dir = tmp_path / 'full'
    (error,) = train_on_full_disk(work_dir, 3, checkpoint=dict(max_keep_ckpts=1))
    for part in (
        'iter_3.pth could not be saved',
        'No space left on device',
        'Training goes on',
        f'last good checkpoint is {work_dir}/iter_2.pth',
    ):
        assert part in error
    assert differences(whole, last_checkpoint(work_dir)) == []
    assert [path.name for path in work_dir.glob('iter_*')] == ['iter_4.pth']


def test_a_failed_last_save_is_an_error_and_the_earlier_is_there(tmp_path):
    with pytest.raises(OSError, match='its end is not saved. iter_4.pth could not be'):
        train_on_full_disk(
            tmp_path, 4,
            checkpoint=dict(max_keep_ckpts=1, save_best=None),
            val_dataloader=None, val_cfg=None, val_evaluator=None,
            param_scheduler=None,
        )  # fmt: skip
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_3.pth')
    assert last_checkpoint(tmp_path)['meta']['iter'] == 3


def test_first_save_fails(tmp_path):
    with pytest.raises(
        OSError, match='iter_1.pth could not be saved in /sys/.*set default_hooks.check'
    ):
        train(tmp_path, iters=2, checkpoint=dict(out_dir='/sys'))


def test_control_stock_saving_loses_the_checkpoint(tmp_path, monkeypatch):
    real = CheckpointHook._save_checkpoint_with_step

    def save(self, runner, step, meta):
        if step == 3:
            Path(runner.work_dir, 'iter_3.pth').symlink_to('/dev/full')
        real(self, runner, step, meta)

    monkeypatch.setattr(CheckpointHook, '_save_checkpoint_with_step', save)
    stock = dict(type='CheckpointHook', max_keep_ckpts=1)
    with pytest.raises(OSError, match='No space left'):
        train(tmp_path, iters=4, checkpoint=stock)
    assert not (tmp_path / 'iter_2.pth').exists()


def test_the_previous_best_stays_until_the_next_is_there(tmp_path):
    def best():
        return {path.name for path in tmp_path.glob('best_*')}

    class Watch(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            seen.append((runner.iter, best()))

    seen = []
    runner = build_runner(tmp_path, iters=8)
    runner.register_hook(Watch())
    values = iter([4.0, 3.0, 5.0, 2.0])
    metric = runner.val_evaluator.metrics[0]
    metric.compute_metrics = lambda _: dict(noise=next(values))
    runner.train()
    assert best() == {'best_noise_iter_8.pth'}
    # At the time of the second best, at 4, the first was there, and alone.
    assert any(it == 4 and names == {'best_noise_iter_2.pth'} for it, names in seen)
    assert not any(it > 2 and not names for it, names in seen)


def test_a_checkpoint_is_written_as_it_is_and_read_as_any(tmp_path, monkeypatch):
    """Not put together in memory before, other than by mmengine's hook."""
    put = []

    class Watched(io.BytesIO):
        def getvalue(self):
            put.append(self.getbuffer().nbytes)
            return super().getvalue()

    monkeypatch.setattr(checkpoint, 'io', SimpleNamespace(BytesIO=Watched))
    train(tmp_path / 'safe', iters=1)
    assert not put
    train(tmp_path / 'stock', iters=1, checkpoint=dict(type='CheckpointHook'))
    assert put  # control
    safe, stock = (last_checkpoint(tmp_path / name) for name in ('safe', 'stock'))
    assert not different(safe['state_dict'], stock['state_dict'])


def test_a_write_that_fails_inside_of_torch_is_an_error_of_the_system():
    tensor, file = torch.zeros(100_000), open('/dev/full', 'wb')
    with pytest.raises(RuntimeError):  # control
        torch.save(tensor, file)
    with pytest.raises(OSError, match='No space left'):
        files.save(tensor, file)
    with suppress(OSError):
        file.close()


class TestWriteAtomically:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / 'iter_1.pth'
        path.write_bytes(b'old')
        return path

    def test_limit_of_the_file_size(self, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError) as error:
                write_atomically(path, lambda file: file.write(bytes(5000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.errno == errno.EFBIG
        assert path.read_bytes() == b'old' and os.listdir(path.parent) == [path.name]

    def test_order(self, path, monkeypatch):
        """The data is on the disk before the name is, and the name before the end."""
        calls = []
        for name in ('fsync', 'replace'):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name,
                lambda *args, real=real, name=name: (calls.append(name), real(*args)),
            )  # fmt: skip
        write_atomically(path, lambda file: file.write(b'new'))
        assert calls == ['fsync', 'replace', 'fsync']
        assert path.read_bytes() == b'new' and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('kind', ['SafeCheckpointHook', 'CheckpointHook'])
def test_checkpoints_are_data_that_stock_tools_read(kind, tmp_path):
    class Numbers(Hook):
        priority = 'HIGHEST'

        def before_train(self, runner):
            runner.message_hub.update_info('number', np.float64(0.5))

    schedulers = [dict(type='OneCycleLR', eta_max=0.1, total_steps=9, by_epoch=False)]
    train(
        tmp_path, iters=1, checkpoint=dict(type=kind), param_scheduler=schedulers,
        custom_hooks=[Numbers()],
    )  # fmt: skip
    code = f"import torch; torch.load(r'{tmp_path / 'iter_1.pth'}', weights_only=True)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True)
    assert (done.returncode == 0) == (kind == 'SafeCheckpointHook')  # else the control
    resumed = train(
        tmp_path, iters=2, checkpoint=dict(type=kind), param_scheduler=schedulers
    )
    assert resumed['meta']['iter'] == 2
    assert resumed['message_hub']['runtime_info']['number'] == 0.5
