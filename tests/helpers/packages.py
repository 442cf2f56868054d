"""Building the package, and running Python on it."""

import subprocess
import sys
from pathlib import Path

from man_mm.stack import find_distributions

ROOT = Path(__file__).resolve().parents[2]
# What a package is built from.
BUILT_FROM = ('man_mm', 'configs', 'tools', 'tests', 'requirements', 'benchmarks')
BUILT_FROM += ('docs', 'examples', 'setup.py', 'pyproject.toml', 'MANIFEST.in')
BUILT_FROM += ('Makefile', '.ci', 'model-index.yml', 'mkdocs.yml', 'README.md')
BUILT_FROM += ('CHANGELOG.md', 'CITATION.cff', 'LICENSE')
# Whether these are the maintained forks of OpenMMLab's packages.
ON_FORKS = 'onedl-mmengine' in find_distributions('mmengine')


def run_python(*args, cwd=ROOT):
    command = [sys.executable, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(source, folder):
    """Build a wheel and return its path."""
    options = ['--no-deps', '--no-build-isolation', '--wheel-dir', folder]
    run_python('-m', 'pip', 'wheel', *options, source, cwd=folder)
    (wheel,) = folder.glob('*.whl')
    return wheel
