"""Commands that are run, with their output in the log."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TextIO

from places import CONSTRAINTS, PYTHON, ROOT
from ticker import Ticker


class SetupError(Exception):
    """A failure that is explained to the user in one sentence."""


class Shell:
    """Runs commands with their output in the log and the ticker's line."""

    def __init__(self, log: TextIO, lock: TextIO) -> None:
        self.log = log
        self.lock = lock

    def run(self, *command: str | Path, **env: str) -> None:
        """Run a command.

        Raises:
            SetupError: If the command exits with an error.
        """
        command = tuple(map(str, command))
        self.log.write(f'\n$ {" ".join(command)}\n')
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1', **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            # If this script is killed, its child still holds the lock.
            pass_fds=(self.lock.fileno(),),
        )
        with process, Ticker() as ticker:
            for line in process.stdout:
                self.log.write(line)
                self.log.flush()
                ticker.last_line = line
        if process.returncode:
            shown = ' '.join([Path(command[0]).name, *command[1:4]])
            raise SetupError(f'`{shown} ...` exited with {process.returncode}.')

    def pip(self, subcommand: str, *args: str | Path, **env: str) -> None:
        """Run pip of the environment under the constraints."""
        self.run(PYTHON, '-m', 'pip', subcommand, '-c', CONSTRAINTS, *args, **env)
