"""The documents that the tests read."""

import re
from pathlib import Path

PAGES = sorted(Path('docs').glob('*.md'))
CARDS = sorted(Path('configs').glob('*/README.md'))
DOCUMENTS = [Path('README.md'), Path('CHANGELOG.md'), *PAGES, *CARDS]
NOTEBOOK = Path('examples/local_learning.ipynb')


def blocks(text, language):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def read_marked(document, start, end):
    """What stands between two marks of a document."""
    return document.read_text().partition(start)[2].partition(end)[0].strip()


def write_marked(document, start, end, text):
    """Replaces what stands between two marks of a document."""
    before, _, rest = document.read_text().partition(start)
    document.write_text(f'{before}{start}\n{text}\n{end}{rest.partition(end)[2]}')
