"""Saving: atomic, checked, and safe on full disks and in folders without access."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from short_runs import build_runner, differences, last_checkpoint, train

import man_mm
from man_mm.interruptions import resume_hook
from man_mm.interruptions.files import write_atomically

ITERS = 4


class FullDiskHook(Hook):
    """Lets the temporary file of some saves end on a full device."""

    priority = 'HIGHEST'

    def __init__(self, names):
        self.names = names

    def after_train_iter(self, runner, *args, **kwargs):
        for name in self.names:
            if name.endswith(f'iter_{runner.iter + 1}.pth'):
                Path(runner.work_dir, f'{name}.tmp').symlink_to('/dev/full')


def train_on_full_disk(work_dir, names, **overrides):
    runner = build_runner(work_dir, iters=ITERS, **overrides)
    runner.register_hook(FullDiskHook(names))
    runner.errors = []
    runner.logger.error = runner.errors.append
    try:
        runner.train()
    finally:
        runner.logger.__dict__.pop('error')
    return runner.errors


def test_training_goes_on_after_a_failed_save(tmp_path):
    whole = train(tmp_path / 'whole', iters=ITERS)
    work_dir = tmp_path / 'full'
    keep = dict(max_keep_ckpts=1)
    errors = train_on_full_disk(work_dir, ['iter_3.pth'], checkpoint=keep)
    assert len(errors) == 1
    for part in (
        'iter_3.pth could not be saved',
        'No space left on device',
        'Training goes on',
        f'last good checkpoint is {work_dir}/iter_2.pth',
    ):
        assert part in errors[0]  # fmt: skip
    assert differences(whole, last_checkpoint(work_dir)) == []
    assert [path.name for path in work_dir.glob('iter_*')] == ['iter_4.pth']


def test_a_failed_last_save_is_an_error_and_the_earlier_is_there(tmp_path):
    work_dir = tmp_path / 'full'
    with pytest.raises(OSError, match='its end is not saved. iter_4.pth could not be'):
        train_on_full_disk(
            work_dir, ['iter_4.pth'],
            checkpoint=dict(max_keep_ckpts=1, save_best=None),
            val_dataloader=None, val_cfg=None, val_evaluator=None,
            param_scheduler=None,
        )  # fmt: skip
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_3.pth')
    assert last_checkpoint(work_dir)['meta']['iter'] == 3


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


def test_first_save_fails(tmp_path):
    with pytest.raises(
        OSError, match='iter_1.pth could not be saved in /sys/.*set default_hooks.check'
    ):
        train(tmp_path, iters=2, checkpoint=dict(out_dir='/sys'))


def test_control_stock_saving_loses_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(resume_hook, 'make_saving_safe', lambda runner: None)
    real = CheckpointHook._save_checkpoint_with_step

    def save(self, runner, step, meta):
        if step == 3:
            Path(runner.work_dir, 'iter_3.pth').symlink_to('/dev/full')
        real(self, runner, step, meta)

    monkeypatch.setattr(CheckpointHook, '_save_checkpoint_with_step', save)
    with pytest.raises(OSError, match='No space left'):
        train(tmp_path, iters=4, checkpoint=dict(max_keep_ckpts=1))
    assert not (tmp_path / 'iter_2.pth').exists()


class TestWriteAtomically:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / 'iter_1.pth'
        path.write_bytes(b'old')
        return path

    @staticmethod
    def unharmed(path):
        return path.read_bytes() == b'old' and os.listdir(path.parent) == [path.name]

    def test_replaces(self, path):
        write_atomically(path, b'new', is_checkpoint=False)
        assert path.read_bytes() == b'new' and os.listdir(path.parent) == [path.name]

    def test_limit_of_the_file_size(self, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError) as error:
                write_atomically(path, bytes(5000), is_checkpoint=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.errno == errno.EFBIG and self.unharmed(path)

    def test_a_disk_that_returns_other_data(self, path, monkeypatch):
        def damage(descriptor):
            os.pwrite(descriptor, b'X', 2000)

        monkeypatch.setattr(os, 'fsync', damage)
        with pytest.raises(OSError, match='returns other data'):
            write_atomically(path, bytes(5000), is_checkpoint=False)
        assert self.unharmed(path)

    def test_order(self, path, monkeypatch):
        """The data is on the disk before the name is, and the name before the end."""
        calls = []
        for name in ('fsync', 'replace'):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name,
                lambda *args, real=real, name=name: (calls.append(name), real(*args)),
            )  # fmt: skip
        write_atomically(path, b'new', is_checkpoint=False)
        assert calls == ['fsync', 'replace', 'fsync']


def test_which_hooks_become_safe(tmp_path):
    @HOOKS.register_module(force=True)
    class OwnCheckpointHook(CheckpointHook):
        pass

    for kind in ('CheckpointHook', 'SafeCheckpointHook', 'OwnCheckpointHook'):
        runner = build_runner(tmp_path / kind, iters=1, checkpoint=dict(type=kind))
        warnings = []
        runner.logger.warning = warnings.append
        resume_hook.make_saving_safe(runner)
        hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        own = kind == 'OwnCheckpointHook'
        assert isinstance(hook, man_mm.SafeCheckpointHook) != own
        assert [kind in warning for warning in warnings] == [True] * own


def test_what_cannot_be_resumed_is_told_when_saved(tmp_path):
    class Objects(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            checkpoint['path'] = Path('x')

    runner = build_runner(tmp_path, iters=1)
    runner.register_hook(Objects())
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    assert any('iter_1.pth cannot be resumed' in warning for warning in warnings)
    assert torch.load(tmp_path / 'iter_1.pth', weights_only=False)['path'] == Path('x')
