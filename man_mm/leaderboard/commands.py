"""Commands of results, as they are typed today."""

import re

# Results keep the command that made them, in which a tool may have an older path.
_TOOLS = re.compile(r'\bpython tools/(?:\w+/)*(\w+)\.py\b')
_RENAMED = {'pipeline': 'benchmark_pipeline'}


def present_command(command: str) -> str:
    """The command that does today what a recorded one did.

    Args:
        command: As a result file holds it.

    >>> present_command('OMP_NUM_THREADS=1 python tools/benchmark.py x.py --batch 2')
    'OMP_NUM_THREADS=1 mim run man_mm benchmark x.py --batch 2'
    """

    def run(match: re.Match) -> str:
        return f'mim run man_mm {_RENAMED.get(match[1], match[1])}'

    return _TOOLS.sub(run, command)
