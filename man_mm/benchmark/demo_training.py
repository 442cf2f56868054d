"""The trainings of the demo: two at a time, with their progress on the screen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from man_mm.engine.config_files import find_config
from man_mm.stack import find_distributions

_AT_ONCE = 2  # small networks gain little from several cores
_ITERATION = re.compile(r'Iter\(train\) \[ *(\d+)/(\d+)\]')
_EVERY = 100  # iterations between lines where there is no screen for bars


def train_all(
    runs: Mapping[str, list[str]], work_dir: Path, console: Console
) -> dict[str, Path]:
    """Trains configs by ``mim train mmdet``; the full logs go to their work dirs.

    Args:
        runs: A config and overridden settings of it, by the name of the training.
        work_dir: The folder of the work dirs.
        console: Where the progress is shown.

    Returns:
        The work dirs by the names.

    Raises:
        RuntimeError: If a training fails; the message ends with its log.
    """
    progress = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('left:'),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        started = {}
        for name, arguments in runs.items():
            task = progress.add_task(name, start=False, total=None)

            def report(done: int, total: int, name: str = name, task=task) -> None:
                progress.start_task(task)
                progress.update(task, completed=done, total=total)
                if progress.disable and not done % _EVERY:
                    console.print(f'{name}: {done} of {total} iterations')

            folder = work_dir / re.sub(r'\W+', '_', name)
            started[name] = pool.submit(_train, name, arguments, folder, report)
        return {name: future.result() for name, future in started.items()}


def latest_scalars(work_dir: Path) -> list[dict]:
    """Rows of the newest run's scalar log in a work dir."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def _train(
    name: str, arguments: list[str], work_dir: Path, report: Callable[[int, int], None]
) -> Path:
    config, *options = arguments
    mim = Path(sys.executable).with_name('mim')
    # Of the forks, mim knows the distribution: onedl-mmdetection.
    package = next(iter(find_distributions('mmdet')), 'mmdet')
    command = [mim, 'train', package, find_config(config)]
    command += ['--gpus', '0', '--launcher', 'none', '--work-dir', work_dir]
    command += ['--cfg-options', *options]
    threads = max((os.cpu_count() or 1) // _AT_ONCE, 1)
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := _ITERATION.search(line):
                report(*map(int, found.groups()))
    if process.returncode:
        tail = ''.join(lines[-30:])
        raise RuntimeError(f'{tail}\n{name}: training failed, see {work_dir}.')
    return work_dir
