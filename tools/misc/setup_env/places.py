"""Where things lie in the checkout that is set up."""

from __future__ import annotations

import os
from pathlib import Path

from stacks import choose_stack

ROOT = Path(__file__).resolve().parents[3]
STACK = choose_stack(os.environ.get('STACK', 'openmmlab'))
VENV = ROOT / STACK.venv
STAMPS = VENV / 'stamps'
LOG = VENV / 'setup.log'
LOCK = VENV / 'setup.lock'
PYTHON = VENV / 'bin' / 'python'
REQUIREMENTS = ROOT / 'requirements'
CONSTRAINTS = REQUIREMENTS / 'constraints.txt'
# What an installation of man_mm is made from.
SOURCES = ('man_mm', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml')
SOURCES += ('MANIFEST.in', 'model-index.yml', 'README.md', 'LICENSE')
