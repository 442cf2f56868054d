"""Which checkpoint to resume: a good one, or one clear message."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

KEY = 'man_mm'
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def choose_checkpoint(runner: Runner) -> None:
    """Checks the checkpoint that the runner will load, or chooses one that is good.

    For automatic resuming (``resume=True`` without ``load_from``) it sets
    ``load_from`` to the checkpoint that ``last_checkpoint`` names or, if that cannot
    be resumed, to the newest one that can. All ranks take what rank 0 finds.

    Args:
        runner: A runner that is about to load or resume.

    Raises:
        CheckpointError: If a named checkpoint cannot be used, or if there are
            checkpoints and none can be resumed.
    """
    found: list[Any] = [runner._load_from, None]
    if dist.is_main_process():
        try:
            if runner._load_from is not None:
                check_checkpoint(runner, runner._load_from)
            elif runner._resume:
                found[0] = _newest_good(runner)
        except CheckpointError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    runner._load_from, message = found
    if message is not None:
        raise CheckpointError(message)


def check_checkpoint(runner: Runner, path: str) -> None:
    """Checks that a file can be loaded, and resumed if the runner is to resume.

    Checkpoints on other storage than local files are left to mmengine.

    Args:
        runner: The runner.
        path: The checkpoint.

    Raises:
        CheckpointError: If it cannot be used.
    """
    if '://' in str(path):
        return
    reason = _trouble(runner, Path(path).expanduser(), runner._resume)
    if reason is not None:
        use = 'resumed' if runner._resume else 'loaded'
        raise CheckpointError(f'The checkpoint {path} cannot be {use}: it {reason}.')


def read_checkpoint(path: Path) -> Any:
    """Reads a checkpoint, with its tensors mapped and not yet in memory.

    Args:
        path: A local file.

    Returns:
        What ``torch.save`` wrote.

    Raises:
        CheckpointError: If it is not a whole and unchanged file of ``torch.save``,
            or holds more than data.
    """
    try:
        if not path.exists():
            raise CheckpointError('does not exist')
        if path.is_dir():
            raise CheckpointError('is a folder, not a file')
        _check_archive(path)
        return torch.load(path, map_location='cpu', mmap=True)
    except OSError as error:
        raise CheckpointError(f'cannot be read ({error.strerror})') from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            'holds code, or objects that torch does not load safely '
            f'({_first_line(error)})'
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f'is damaged ({_first_line(error)})') from error


def _check_archive(path: Path) -> None:
    """Compares checksums, which torch does not."""
    with open(path, 'rb') as file:
        start = file.read(4)
    if not start:
        raise CheckpointError('is empty, as after a full disk or a power cut')
    if start != b'PK\x03\x04':
        raise CheckpointError('is not a file of torch.save (1.6 or later)')
    if not zipfile.is_zipfile(path):
        raise CheckpointError('is cut off: it was written only in part')
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith('/data.pkl') for name in archive.namelist()):
            raise CheckpointError('is a zip archive, but not one of torch.save')
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(f'is damaged (the checksum of {broken} is wrong)')


def _newest_good(runner: Runner) -> str | None:
    pointer = Path(runner.work_dir, 'last_checkpoint')
    skipped = []
    for path in _candidates(runner, pointer):
        reason = _trouble(runner, path, resume=True)
        if reason is None:
            for line in skipped:
                runner.logger.warning(f'Not resumed: {line}.')
            return str(path)
        skipped.append(f'{path} {reason}')
    if not skipped:
        return None
    raise CheckpointError(
        'No checkpoint can be resumed:\n  '
        + '\n  '.join(skipped)
        + '\nName another one with load_from, or remove these and '
        f'{pointer} to start anew.'
    )


def _candidates(runner: Runner, pointer: Path) -> Iterator[Path]:
    """What last_checkpoint names, then all others, the newest first."""
    folders, named = [Path(runner.work_dir)], None
    with suppress(OSError, UnicodeDecodeError):
        text = pointer.read_text().strip()
        if '://' in text:  # other storage, which mmengine reads
            return
        if text and text.isprintable():
            named = Path(text)
            folders += [named.parent] if named.is_absolute() else []
    if pointer.exists():
        yield named or pointer
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    for hook in hooks:
        if hook.out_dir and '://' not in str(hook.out_dir):
            folders.append(Path(hook.out_dir, Path(runner.work_dir).name))
    others = {
        path.absolute()
        for folder in folders
        for hook in hooks
        for path in folder.glob(hook.filename_tmpl.format('*'))
    }
    yield from sorted(others - {named}, key=_age, reverse=True)


def _age(path: Path) -> tuple[str, int, int]:
    """Orders checkpoints by when they were written, and this by what they say.

    The time of the file changes when a folder is copied.
    """
    try:
        meta = torch.load(path, map_location='cpu', mmap=True)['meta']
        return meta['time'], meta['iter'], 0
    except Exception:  # damaged in any way: last, and told why when its turn comes
        return '', 0, path.stat().st_mtime_ns


def _trouble(runner: Runner, path: Path, resume: bool) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    if path.name == 'last_checkpoint':
        return 'is empty or garbage, and names no checkpoint'
    try:
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict):
            kind = type(checkpoint).__name__
            return f'holds a {kind}, not the dictionary of a checkpoint'
        if resume:
            _check_content(runner, checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _check_content(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Raises unless this run can go on from the checkpoint."""
    format_ = checkpoint.get(KEY, {}).get('format', FORMAT)
    if format_ != FORMAT:
        raise CheckpointError(
            f'was written by a newer man_mm (format {format_}, known is {FORMAT}): '
            'update man_mm'
        )
    instead = 'to start from its weights, set load_from without resume'
    lacks = [k for k in ('meta', 'state_dict', 'message_hub') if k not in checkpoint]
    if lacks:
        raise CheckpointError(f'is not of a training run (no {lacks[0]!r}): {instead}')
    meta = checkpoint['meta']
    if not all(isinstance(meta.get(key), int) for key in ('epoch', 'iter')):
        raise CheckpointError("does not say how far it is (meta['epoch'] and ['iter'])")
    if 'optimizer' not in checkpoint:
        raise CheckpointError(
            'has no optimizer, as a best or published checkpoint, or one of '
            f'save_optimizer=False: {instead}'
        )
    _check_weights(runner, checkpoint['state_dict'])
    _check_optimizer(runner, checkpoint['optimizer'])


def _check_weights(runner: Runner, saved: dict[str, Tensor]) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    own = {key: value.shape for key, value in model.state_dict().items()}
    theirs = {key.removeprefix('module.'): value for key, value in saved.items()}
    wrong = [
        key
        for key in sorted(own.keys() | theirs.keys())
        if key not in own or key not in theirs or own[key] != theirs[key].shape
    ]
    if wrong:
        raise CheckpointError(
            f'is of another model: {len(wrong)} of {len(own)} weights are missing, '
            f'unknown or of another shape, first {wrong[0]!r}'
        )
    for key, value in theirs.items():
        if value.is_floating_point() and value.isnan().any():
            raise CheckpointError(
                f'has NaN in {key!r}: the training had diverged. Resume an earlier one '
                'with load_from, and with a lower learning rate or clip_grad'
            )


def _check_optimizer(runner: Runner, saved: dict[str, Any]) -> None:
    wrapper = runner.optim_wrapper
    ours = wrapper.optimizer.param_groups[0].keys()
    theirs = saved['param_groups'][0].keys()
    # torch adds options now and then, so one side may know more.
    if ours - theirs - {'initial_lr'} and theirs - ours - {'initial_lr'}:
        raise CheckpointError(
            f'is of another optimizer than {type(wrapper.optimizer).__name__}: resume '
            'with the one that it was trained with'
        )
    try:
        # Loading is the check; what is resumed is loaded over it.
        wrapper.load_state_dict(saved)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f'does not fit: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    lines = [line.strip(' .:') for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
