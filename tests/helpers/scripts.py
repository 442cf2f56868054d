"""Scripts of ``tools/``, run in this process."""

import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def run_script(name, *args):
    """Runs the script of this name, wherever in ``tools/`` it is, with arguments."""
    (path,) = TOOLS.rglob(f'{name}.py')
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.object(sys, 'argv', [str(path), *map(str, args)]):
            runpy.run_path(str(path), run_name='__main__')
    finally:
        signal.signal(signal.SIGTERM, handler)
