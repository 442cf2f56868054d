"""Commands of results, as they are typed today."""

import doctest
import json
import re
from pathlib import Path

from scripts import TOOLS

from man_mm.leaderboard import commands
from man_mm.leaderboard.commands import present_command


def test_the_example_runs():
    assert doctest.testmod(commands) == doctest.TestResults(0, 1)


def test_tools_that_moved():
    old = 'python tools/compare.py "MAN=configs/man/x.py a=1" --seeds 0'
    new = 'mim run man_mm compare "MAN=configs/man/x.py a=1" --seeds 0'
    assert present_command(old) == new == present_command(new)
    assert present_command('python tools/pipeline.py x.py').endswith(
        'man_mm benchmark_pipeline x.py'
    )
    assert present_command('python my_tools/compare.py') == 'python my_tools/compare.py'


def test_every_recorded_command_names_a_tool_that_is_there():
    names = set()
    for path in Path('benchmarks/results').rglob('*.json'):
        command = json.loads(path.read_text()).get('command') or ''
        if 'torchrun' not in command:
            names |= set(re.findall(r'man_mm (\w+)', present_command(command)))
    assert {'benchmark', 'compare', 'benchmark_pipeline'} <= names
    for name in names:
        assert len(list(TOOLS.rglob(f'{name}.py'))) == 1, name
