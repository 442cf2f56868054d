"""Set up an environment with everything that man_mm, its tests and its demo need.

Run by ``make setup``; needs nothing but Python's standard library. Each step
leaves a stamp when it is finished, so a second call does nothing, and a call after
an interruption goes on where the last one stopped. Starts under Python 3.7 or later,
to say what is missing, and finds a supported one for ``.venv`` by itself.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from typing import TextIO

from interpreter import create_venv, probe, remove_incomplete_packages
from places import LOCK, LOG, PYTHON, ROOT, VENV
from shell import SetupError, Shell
from stamps import is_stamped, stamp_keys, write_stamp
from steps import all_steps
from ticker import duration

LOG_TAIL = 25


def python_key() -> str:
    """Name the Python of ``.venv``; empty if there is none."""
    found = probe(PYTHON)
    return f'Python 3.{found[0]}' if found else ''


def announce(number: int, total: int, title: str, typical: str) -> None:
    """Print the line that starts a step."""
    print(f'[{number}/{total}] {title} (typically {typical})', flush=True)


def set_up(shell: Shell) -> int:
    """Run the steps that are not up to date.

    Returns:
        How many steps ran.
    """
    steps = all_steps()
    total = len(steps) + 1
    ran = 0
    if not (python_key() and is_stamped('venv', python_key())):
        announce(1, total, f'Python environment in {VENV.name}', '10 s')
        create_venv(shell)
        write_stamp('venv', python_key())
        ran += 1
    keys = stamp_keys(steps, python_key())
    for number, step in enumerate(steps, 2):
        if is_stamped(step.name, keys[step.name]):
            continue
        begin = time.monotonic()
        announce(number, total, step.title, step.typical)
        remove_incomplete_packages()
        step.action(shell)
        write_stamp(step.name, keys[step.name])
        print(f'      done in {duration(time.monotonic() - begin)}', flush=True)
        ran += 1
    return ran


def lock_venv(lock: TextIO) -> None:
    """Wait until no other set-up works in this checkout."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('Waiting for another set-up of this checkout to end.', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def report_failure(error: Exception, log_start: int) -> None:
    """Print what failed, after the end of what was logged since ``log_start``."""
    lines = LOG.read_bytes()[log_start:].decode('utf-8', 'replace').splitlines()
    for line in lines[-LOG_TAIL:]:
        print(f'  | {line}', file=sys.stderr)
    print(f'\nThe set-up failed: {error}', file=sys.stderr)
    if lines:
        print(
            f'Full log: {LOG.relative_to(ROOT)}. Finished steps are kept: the same '
            'command goes on from here.',
            file=sys.stderr,
        )


def main() -> int:
    """Set up the environment and report.

    Returns:
        Exit status: 0, 1 after a failure, 130 after Ctrl-C.
    """
    begin = time.monotonic()
    VENV.mkdir(exist_ok=True)
    with LOCK.open('w') as lock, LOG.open('a', encoding='utf-8') as log:
        lock_venv(lock)
        log_start = log.tell()
        try:
            ran = set_up(Shell(log, lock))
        except (SetupError, subprocess.SubprocessError, OSError) as error:
            report_failure(error, log_start)
            return 1
        except KeyboardInterrupt:
            print('\nInterrupted; the same command goes on from here.')
            return 130
    state = 'is ready' if ran else 'is up to date'
    took = duration(time.monotonic() - begin)
    print(f'The environment in {VENV.name} {state} ({took}).')
    return 0


if __name__ == '__main__':
    sys.exit(main())
