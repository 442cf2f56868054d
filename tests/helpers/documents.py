"""The documents that the tests read."""

import re
from pathlib import Path

PAGES = sorted(Path('docs').glob('*.md'))
CARDS = sorted(Path('configs').glob('*/README.md'))
DOCUMENTS = [Path('README.md'), Path('CHANGELOG.md'), *PAGES, *CARDS]
NOTEBOOK = Path('examples/local_learning.ipynb')


def blocks(text, language):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
