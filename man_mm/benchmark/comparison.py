r"""Train configs with several seeds and compare them: accuracy, memory and time.

    mim run man_mm compare end-to-end=configs/end_to_end/edsr_x2_photos.py \
        MAN=configs/man/edsr_x2_man_photos.py \
        "no bank=configs/man/edsr_x2_man_photos.py \
            optim_wrapper.local_learning.aux_head.use_bank=False" \\
        --seeds 0 1 2 --out benchmarks/results/edsr_x2_photos

For classification, detection and super-resolution alike. Every run writes one JSON
file; what is there already is not trained again, and a run that was stopped goes on
from its last checkpoint. Ratios are those to the first entry. Arguments can also come
from a file, one a line, such as those in ``benchmarks/comparisons``:

    mim run man_mm compare @benchmarks/comparisons/fashion.txt --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .comparison_report import draw_comparison, make_table, markdown_rows
from .training_runs import Run, RunError, parse_entry, train

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


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line ``args``, by default the process's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars='@',
    )
    parser.add_argument('entries', nargs='*', metavar='"NAME=CONFIG [KEY=VALUE ...]"')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/compare/results'), help='JSON files'
    )
    parser.add_argument(
        '--work-dirs', type=Path, default=Path('work_dirs/compare'), help='checkpoints'
    )
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='for all'
    )
    parser.add_argument('--picture', type=Path, help='PNG file for the curves')
    parser.add_argument(
        '--from', dest='source', type=Path, help='show JSON files, train nothing'
    )
    parser.add_argument(
        '--markdown', action='store_true', help='print rows for documents'
    )
    options = parser.parse_args(args)
    signal.signal(signal.SIGTERM, _end)
    if not (options.entries or options.source):
        parser.error('give an entry NAME=CONFIG, or --from DIR')
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.source:
        results = read_folder(options.source)
    else:
        try:
            entries = [
                parse_entry(text, tuple(options.cfg_options))
                for text in options.entries
            ]
        except ValueError as error:
            parser.error(str(error))
        runs = [
            Run(entry, seed, options.out, options.work_dirs, position)
            for seed in options.seeds
            for position, entry in enumerate(entries)
        ]
        try:
            run_all(runs, options.jobs, console)
        except RunError as error:
            sys.exit(str(error))
        results = read_results(run.path for run in runs)
    if options.markdown:
        print('\n'.join(markdown_rows(results)))
    else:
        console.print(make_table(results))
    if options.picture:
        draw_comparison(results, options.picture)
        console.print(options.picture, **_PLAIN)


def _end(*_) -> None:
    sys.exit('Ended, the trainings too. The same command goes on where they were.')
