"""Progress of a long step on a terminal or in a log; standard library only."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time


def duration(seconds: float) -> str:
    """Format seconds as ``4.2 s`` or ``3 min 05 s``."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    return f'{int(seconds // 60)} min {int(seconds % 60):02d} s'


def shorten(line: str) -> str:
    """Reduce an output line to what tells progress, ``[37/77]`` for ninja's."""
    line = ' '.join(line.split())
    counter = re.match(r'\[\d+/\d+\]', line)
    return f'compiling {counter.group()}' if counter else line


class Ticker(threading.Thread):
    """Shows the elapsed time and the last output line while a step runs.

    A terminal gets one line that is rewritten every second, a log file a new line
    every minute.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.last_line = ''
        self._start_time = time.monotonic()
        self._finished = threading.Event()

    def run(self) -> None:
        while not self._finished.wait(1 if sys.stdout.isatty() else 60):
            elapsed = duration(time.monotonic() - self._start_time)
            text = f'      {elapsed}  {shorten(self.last_line)}'
            if sys.stdout.isatty():
                width = shutil.get_terminal_size().columns - 1
                print(f'\r\033[K{text[:width]}', end='', flush=True)
            else:
                print(text[:120], flush=True)

    def __enter__(self) -> Ticker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self.join()
        if sys.stdout.isatty():
            print('\r\033[K', end='', flush=True)
