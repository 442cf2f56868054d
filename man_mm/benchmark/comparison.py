"""Comparisons over seeds: all trainings of several configs, and their results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .training_runs import Run, RunError, train

_PLAIN = dict(highlight=False, markup=False)


def run_all(runs: Sequence[Run], jobs: int, console: Console) -> None:
    """Trains all runs that have no result yet, some at a time.

    Args:
        runs: The runs.
        jobs: How many train at the same time; they share the CPU cores.
        console: Where progress is shown.

    Raises:
        RunError: If one fails; others that are running are ended then, and go on in
            the next call.
    """
    todo = [run for run in runs if not run.is_done]
    for run in todo:
        if run.path.exists():
            console.print(f'{run.path} is of other settings: replaced.', **_PLAIN)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    columns = ('{task.description}', BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        stopping = False

        def work(run: Run) -> None:
            task = progress.add_task(run.name, total=run.length)

            def show(done: int) -> None:
                if stopping:
                    raise RunError(f'{run.name} was stopped.')
                progress.update(task, completed=done)

            result = train(run, threads, show)
            progress.remove_task(task)
            values = ', '.join(f'{k} {v:.5g}' for k, v in result['metrics'].items())
            console.print(f'{run.name}: {values}', **_PLAIN)

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, run) for run in todo]
            try:
                done, others = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stopping = True
                for future in futures:
                    future.cancel()
            for future in done:
                future.result()


def read_results(paths: Iterable[Path]) -> list[dict]:
    """Reads result files."""
    return [json.loads(path.read_text()) for path in paths]


def read_folder(folder: Path) -> list[dict]:
    """Reads all result files of a folder, in the order of the entries and seeds."""
    results = read_results(folder.glob('*_seed*.json'))
    return sorted(results, key=lambda result: (result['position'], result['seed']))
