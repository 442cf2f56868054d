"""Which checkpoint to resume: a good one, or one clear message."""

from __future__ import annotations

import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from .safe_loading import allow_safe_loading

KEY = 'man_mm'
FORMAT = 2  # 1 held random states


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def choose_checkpoint(runner: Runner) -> None:
    """Checks the checkpoint that the runner will load, or chooses one that is good.

    For automatic resuming (``resume=True`` without ``load_from``) it sets
    ``load_from`` to the checkpoint that ``last_checkpoint`` names or, if that cannot
    be resumed, to the newest one that can. All ranks take what rank 0 finds.
    Checkpoints on other storage than local files are left to mmengine.

    Args:
        runner: A runner that is about to load or resume.

    Raises:
        CheckpointError: If a named checkpoint cannot be used, or if there are
            checkpoints and none can be resumed.
    """
    allow_safe_loading()
    named = runner._load_from
    found: list[Any] = [named, None]
    if dist.is_main_process():
        try:
            if named is None and runner._resume:
                found[0] = _newest_good(runner)
            elif named is not None and '://' not in str(named):
                _check(runner, Path(named).expanduser(), runner._resume)
        except CheckpointError as error:
            use = 'resumed' if runner._resume else 'loaded'
            says = f'The checkpoint {named} cannot be {use}: it {error}.'
            found[1] = str(error) if named is None else says
    dist.broadcast_object_list(found)
    runner._load_from, message = found
    if message is not None:
        raise CheckpointError(message)


def _newest_good(runner: Runner) -> str | None:
    pointer, named = Path(runner.work_dir, 'last_checkpoint'), ''
    with suppress(OSError, UnicodeDecodeError):
        named = pointer.read_text().strip()
    if '://' in named:
        return None
    skipped, candidates = [], _all_checkpoints(runner)
    if named.isprintable() and named:
        candidates = [
            Path(named),
            *(path for path in candidates if path != Path(named)),
        ]
    elif pointer.exists():
        skipped = [f'{pointer} is empty or garbage, and names no checkpoint']
    for path in candidates:
        try:
            _check(runner, path, resume=True)
        except CheckpointError as error:
            skipped.append(f'{path} {error}')
            continue
        for line in skipped:
            runner.logger.warning(f'Not resumed: {line}.')
        return str(path)
    if not skipped:
        return None
    raise CheckpointError(
        'No checkpoint can be resumed:\n  '
        + '\n  '.join(skipped)
        + '\nName another one with load_from, or remove these and '
        f'{pointer} to start anew.'
    )


def _all_checkpoints(runner: Runner) -> list[Path]:
    """What the run has saved, the newest first."""
    found = set()
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folders = [Path(runner.work_dir)]
            if hook.out_dir and '://' not in str(hook.out_dir):
                folders.append(Path(hook.out_dir, folders[0].name))
            pattern = re.sub(r'{.*?}', '*', hook.filename_tmpl)
            found.update(p.absolute() for f in folders for p in f.glob(pattern))
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> tuple[str, int]:
    """When it was saved, as it says: the time of a file changes when it is copied."""
    with suppress(Exception):  # damaged in any way: told when its turn comes
        meta = torch.load(path, map_location='cpu', mmap=True)['meta']
        return meta['time'], meta['iter']
    return '', 0


def _check(runner: Runner, path: Path, resume: bool) -> None:
    """Raises unless a checkpoint can be loaded, and resumed if so wanted."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise CheckpointError(f'holds a {kind}, not the dictionary of a checkpoint')
    if not resume:
        return
    format_ = checkpoint.get(KEY, {}).get('format', FORMAT)
    if format_ > FORMAT:
        raise CheckpointError(
            f'was written by a newer man_mm (format {format_}, known is {FORMAT}): '
            'update man_mm'
        )
    there = checkpoint.keys() | checkpoint.get('meta', {}).keys()
    needed = ('meta', 'state_dict', 'message_hub', 'epoch', 'iter', 'optimizer')
    lacks = [key for key in needed if key not in there]
    if lacks:
        raise CheckpointError(
            f'has no {lacks[0]!r}, as weights alone or a published checkpoint: to '
            'start from its weights, set load_from without resume'
        )
    _check_weights(runner, checkpoint['state_dict'])
    _check_optimizer(runner, checkpoint['optimizer'])


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
        with open(path, 'rb') as file:
            start = file.read(4)
        if not start:
            raise CheckpointError('is empty, as after a full disk or a power cut')
        if start != b'PK\x03\x04':
            raise CheckpointError('is not a file of torch.save (1.6 or later)')
        with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f'is damaged (the checksum of {broken} is wrong)')
        return torch.load(path, map_location='cpu', mmap=True)
    except OSError as error:
        raise CheckpointError(f'cannot be read ({error.strerror})') from error
    except zipfile.BadZipFile as error:
        raise CheckpointError('is cut off: it was written only in part') from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            'holds code, or objects that torch does not load safely '
            f'({_first_line(error)})'
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(
            f'is not a file of torch.save ({_first_line(error)})'
        ) from error


def _check_weights(runner: Runner, saved: dict[str, torch.Tensor]) -> None:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    own = {key: value.shape for key, value in model.state_dict().items()}
    theirs = {key.removeprefix('module.'): value.shape for key, value in saved.items()}
    wrong = sorted({key for key, _ in own.items() ^ theirs.items()})
    if wrong:
        raise CheckpointError(
            f'is of another model: {len(wrong)} of {len(own)} weights are missing, '
            f'unknown or of another shape, first {wrong[0]!r}'
        )
    for key, value in saved.items():
        if value.isnan().any():
            raise CheckpointError(
                f'has NaN in {key!r}: the training had diverged. Resume an earlier one '
                'with load_from, and with a lower learning rate or clip_grad'
            )


def _check_optimizer(runner: Runner, saved: dict[str, Any]) -> None:
    wrapper = runner.optim_wrapper
    ours = wrapper.optimizer.param_groups[0].keys() | {'initial_lr'}
    theirs = saved['param_groups'][0].keys() | {'initial_lr'}
    # torch adds options now and then, so one side may know more.
    if ours - theirs and theirs - ours:
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
