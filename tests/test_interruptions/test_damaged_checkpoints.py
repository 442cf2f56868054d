"""Every kind of bad checkpoint: skipped with its reason, or one clear message."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from short_runs import build_runner, differences, last_checkpoint, train

from man_mm.interruptions import resume_hook
from man_mm.interruptions.checkpoints import CheckpointError, choose_checkpoint

ITERS = 3


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The work dir of a run with three checkpoints."""
    work_dir = tmp_path_factory.mktemp('whole')
    train(work_dir, iters=ITERS)
    return work_dir


@pytest.fixture(scope='module')
def runner(tmp_path_factory):
    """A runner that is ready to resume."""
    runner = build_runner(tmp_path_factory.mktemp('other'), iters=1)
    runner.train()
    runner.warnings = []
    runner.logger.warning = runner.warnings.append
    return runner


@pytest.fixture
def work_dir(whole, tmp_path):
    """A copy, to be damaged."""
    copy = tmp_path / 'run'
    shutil.copytree(whole, copy)
    (copy / 'last_checkpoint').write_text(str(copy / 'iter_3.pth'))
    return copy


def choose(runner, work_dir, named=None, resume=True):
    runner._work_dir, runner._load_from, runner._resume = str(work_dir), named, resume
    runner.warnings.clear()
    choose_checkpoint(runner)
    return runner._load_from


class Attack:
    def __reduce__(self):
        return os.system, ('true',)


def write(content):
    return lambda path: path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Changes one bit of a tensor, which torch.load does not notice."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith('/data/0'))
    content = bytearray(path.read_bytes())
    content[info.header_offset + 200] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # the control


def folder(path):
    path.unlink()
    path.mkdir()


def archive(path):
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('arr_0.npy', 'numbers')


def content(change):
    """Changes what a checkpoint holds, and saves it as it should be."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def instead(change):
    """Saves something else."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


def old_format(path):
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def weight(checkpoint):
    return checkpoint['state_dict']['backbone.conv1.weight']


def other_heads(checkpoint):
    local = checkpoint['optimizer']['local_learning']
    local['heads'] = {f'other.{key}': value for key, value in local['heads'].items()}


def adam(checkpoint):
    group = checkpoint['optimizer']['param_groups'][0]
    checkpoint['optimizer']['param_groups'] = [
        dict(params=group['params'], lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    ]


KINDS = {
    'missing': (Path.unlink, r'cannot be read \(No such file or directory\)'),
    'a folder': (folder, r'cannot be read \(Is a directory\)'),
    'empty': (write(b''), 'is empty, as after a full disk'),
    'cut off': (cut, 'is cut off: it was written only in part'),
    'one bit': (flip, r'is damaged \(the checksum of .*/data/0 is wrong'),
    'random bytes': (write(os.urandom(999)), 'is not a file of torch.save'),
    'a web page': (write(b'<html>404</html>'), 'is not a file of torch.save'),
    'zip of numpy': (archive, r'is not a file of torch.save \(.*arr_0.npy'),
    'old torch': (old_format, r'is not a file of torch.save \(1.6 or later\)'),
    'code': (instead(lambda c: dict(c, more=Attack())), 'holds code, or objects'),
    'a list': (instead(lambda c: [c]), 'holds a list, not the dictionary'),
    'weights': (
        instead(lambda c: dict(c['state_dict'])),
        "has no 'meta', .*set load_from without resume",
    ),
    'no log': (content(lambda c: c.pop('message_hub')), "has no 'message_hub'"),
    'no progress': (
        content(lambda c: c['meta'].pop('iter')),
        "has no 'iter'",
    ),
    'published': (
        content(lambda c: c.pop('optimizer')),
        "has no 'optimizer'.*set load_from without resume",
    ),
    'end-to-end': (
        content(lambda c: c['optimizer'].pop('local_learning')),
        'was not trained by local learning',
    ),
    'other partition': (
        content(other_heads),
        'resume with the partition and aux_head that it was trained with',
    ),
    'other model': (
        content(lambda c: c['state_dict'].pop('head.fc.bias')),
        "is of another model: 1 of .* first 'head.fc.bias'",
    ),
    'other width': (
        content(
            lambda c: c['state_dict'].update(
                {'backbone.conv1.weight': torch.zeros(9, 3, 3, 3)}
            )
        ),
        "another shape, first 'backbone.conv1.weight'",
    ),
    'NaN': (
        content(lambda c: weight(c).fill_(torch.nan)),
        "has NaN in 'backbone.conv1.weight': the training had diverged",
    ),
    'other optimizer': (content(adam), 'is of another optimizer than SGD'),
    'fewer parameters': (
        content(lambda c: c['optimizer']['param_groups'][0]['params'].pop()),
        'does not fit: ',
    ),
    'newer': (
        content(lambda c: c['man_mm'].update(format=3)),
        r'written by a newer man_mm \(format 3, known is 2\): update',
    ),
}


@pytest.mark.parametrize('kind', KINDS)
def test_damage(kind, runner, work_dir):
    damage, reason = KINDS[kind]
    damage(work_dir / 'iter_3.pth')
    # Automatic: the one before.
    assert choose(runner, work_dir) == str(work_dir / 'iter_2.pth')
    assert len(runner.warnings) == 1
    assert re.search(f'^Not resumed: .*iter_3.pth .*{reason}', runner.warnings[0])
    assert '\n' not in runner.warnings[0]
    # Named: an error.
    named = str(work_dir / 'iter_3.pth')
    with pytest.raises(
        CheckpointError,
        match=f'^The checkpoint .*3.pth cannot be resumed: it .*{reason}',
    ):
        choose(runner, work_dir, named)


def test_good_ones(runner, work_dir):
    newest = str(work_dir / 'iter_3.pth')
    assert choose(runner, work_dir) == newest
    assert choose(runner, work_dir, newest) == newest
    assert runner.warnings == []


@pytest.mark.parametrize(
    'damage, reason',
    [
        (write(b''), 'last_checkpoint is empty or garbage'),
        (write(b'\xff\x00\xfe'), 'last_checkpoint is empty or garbage'),
        (write(b'x' * 5000), r'x cannot be read \(File name too long\)'),
        (write(b'/nowhere/iter_9.pth'), '/nowhere/iter_9.pth cannot be read'),
        (Path.unlink, None),
    ],
)
def test_damaged_last_checkpoint(damage, reason, runner, work_dir):
    damage(work_dir / 'last_checkpoint')
    # A copied folder has new dates: the newest is known from what it says.
    os.utime(work_dir / 'iter_1.pth')
    assert choose(runner, work_dir) == str(work_dir / 'iter_3.pth')
    assert len(runner.warnings) == (reason is not None)
    if reason is not None:
        assert re.search(reason, runner.warnings[0])


def test_none_is_left(runner, work_dir, tmp_path):
    for path in work_dir.glob('iter_*.pth'):
        cut(path)
    with pytest.raises(CheckpointError, match='No checkpoint can be resumed') as error:
        choose(runner, work_dir)
    assert str(error.value).count('is cut off') == 3
    assert 'to start anew' in str(error.value)
    assert choose(runner, tmp_path) is None  # nothing there: a new run


def test_loading_without_resuming(runner, work_dir):
    weights = work_dir / 'iter_3.pth'
    KINDS['weights'][0](weights)
    assert choose(runner, work_dir, str(weights), resume=False) == str(weights)
    cut(weights)
    with pytest.raises(CheckpointError, match='cannot be loaded: it is cut off'):
        choose(runner, work_dir, str(weights), resume=False)
    assert (
        choose(runner, work_dir, 's3://bucket/iter_3.pth') == 's3://bucket/iter_3.pth'
    )


def test_a_run_falls_back_and_loses_nothing(whole, work_dir, monkeypatch):
    cut(work_dir / 'iter_3.pth')
    assert differences(last_checkpoint(whole), train(work_dir, iters=ITERS)) == []
    cut(work_dir / 'iter_3.pth')
    with monkeypatch.context() as patch:
        patch.setattr(resume_hook, 'choose_checkpoint', lambda runner: None)
        with pytest.raises(
            (RuntimeError, OSError)
        ):  # the control: mmengine alone gives up
            train(work_dir, iters=ITERS)
