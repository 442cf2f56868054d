"""Where things lie in the checkout that is set up."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / '.venv'
STAMPS = VENV / 'stamps'
LOG = VENV / 'setup.log'
LOCK = VENV / 'setup.lock'
PYTHON = VENV / 'bin' / 'python'
REQUIREMENTS = ROOT / 'requirements'
CONSTRAINTS = REQUIREMENTS / 'constraints.txt'
# What an installation of man_mm is made from.
SOURCES = ('man_mm', 'configs', 'tools', 'requirements', 'setup.py', 'pyproject.toml')
SOURCES += ('MANIFEST.in', 'model-index.yml', 'README.md', 'LICENSE')
