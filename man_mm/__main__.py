"""Runs a tool: ``python -m man_mm NAME ...``, as ``mim run man_mm NAME ...`` does.

For environments without ``mim``, and for that of onedl-mim, which does not find the
tools of a package that is named as it is imported.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from man_mm.engine.config_files import shipped_folder

NO_TOOLS = 'setup_env'  # prepares a clone, run by make


def find_tools() -> dict[str, Path]:
    """Finds the scripts that can be run, by their names."""
    paths = sorted((shipped_folder() / 'tools').rglob('*.py'))
    return {path.stem: path for path in paths if NO_TOOLS not in path.parts}


def main() -> None:
    """Runs the script that the command line names, with the arguments after it."""
    tools = find_tools()
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in tools:
        raise SystemExit(f'python -m man_mm NAME ..., with one of {", ".join(tools)}')
    sys.argv = [str(tools[name]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
