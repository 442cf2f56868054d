"""Tables in documents and metafiles that are generated from result files.

In a document, ``<!-- results: KIND FOLDER ... -->`` and ``<!-- end of results -->``
enclose a table of folders of ``benchmarks/results``; `tables.KINDS` lists the kinds.
Two kinds are of the leaderboard's entries: ``entries FOLDER``, of a folder of
``configs``, and ``claims ID ...``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import yaml

from .entries import RESULTS
from .entry_tables import ENTRY_KINDS
from .tables import KINDS, TableError

DOCUMENTS = ('README.md', 'docs/*.md', 'configs/*/README.md')
METAFILES = 'configs/*/metafile.yml'
_BEGIN, _END = '<!-- results: {} -->', '<!-- end of results -->'
_BLOCK = re.compile(
    r'^<!-- results: (.+?) -->\n.*?^<!-- end of results -->$', re.DOTALL | re.MULTILINE
)
# A model's config and metadata, behind which its results are written.
_MODEL = re.compile(
    r'^    Config: (?P<config>\S+)\n(?:    Metadata:\n(?:      .*\n)*)?', re.MULTILINE
)
_META_BEGIN, _META_END = '    # from the leaderboard', '    # end of results'
# OpenMMLab's words for a task and its metrics; those of detection are in percent.
_TASKS = {
    'detection': 'Object Detection',
    'classification': 'Image Classification',
    'super-resolution': 'Image Super-Resolution',
}
_METAFILE_METRICS = {'mAP': 'box AP', 'AP50': 'box AP50', 'top-1': 'Top 1 Accuracy'}


def update_documents(root: Path, entries: Sequence[dict]) -> dict[Path, str]:
    """The documents and metafiles as they should be.

    Args:
        root: The repository.
        entries: All entries of the leaderboard.

    Returns:
        Their text by path.

    Raises:
        TableError: If a marker names no results.
    """
    texts = {}
    for path in documents(root):
        text = path.read_text('utf-8')
        try:
            texts[path] = _BLOCK.sub(lambda m: _block(m[1], root, entries), text)
        except TableError as error:
            raise TableError(f'{path.relative_to(root)}: {error}') from error
    for path in sorted(root.glob(METAFILES)):
        texts[path] = update_metafile(path.read_text('utf-8'), entries)
    return texts


def documents(root: Path) -> list[Path]:
    """The documents whose numbers come from results."""
    return [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def unmarked_numbers(text: str) -> list[str]:
    """Rows with measured numbers that stand outside of the markers.

    Rows that name a setting in backticks do not count.
    """
    rows = re.findall(r'^\|.*\d\.\d+.*\|$', _BLOCK.sub('', text), re.MULTILINE)
    return [row for row in rows if '`' not in row]


def unclosed_markers(text: str) -> list[str]:
    """Lines with a marker that has no partner."""
    text = _BLOCK.sub('', text)
    return re.findall(r'^<!-- (?:results:|end of results).*$', text, re.MULTILINE)


def _block(name: str, root: Path, entries: Sequence[dict]) -> str:
    kind, _, rest = name.partition(' ')
    if kind not in (*KINDS, *ENTRY_KINDS):
        known = ', '.join((*KINDS, *ENTRY_KINDS))
        raise TableError(f'<!-- results: {name} -->: write one of {known}.')
    if kind in ENTRY_KINDS:
        lines = list(ENTRY_KINDS[kind](entries, rest))
    else:
        folders = [RESULTS / folder for folder in rest.split()]
        takes = len(signature(KINDS[kind]).parameters)
        if len(folders) != takes:
            raise TableError(f'<!-- results: {name} -->: {kind} takes {takes} folders.')
        for folder in folders:
            if not any((root / folder).glob('*.json')):
                raise TableError(f'<!-- results: {name} -->: {folder} has none.')
        lines = KINDS[kind](*(root / folder for folder in folders))
    return '\n'.join([_BEGIN.format(name), *lines, _END])


def update_metafile(text: str, entries: Sequence[dict]) -> str:
    """Writes the leaderboard's results into a metafile, in OpenMMLab's vocabulary.

    Args:
        text: The metafile.
        entries: All entries of the leaderboard.

    Returns:
        The metafile with ``Results`` for each config that has an entry as it is,
        without options of its own.
    """
    block = rf'^{_META_BEGIN}\n.*?^{_META_END}\n'
    text = re.sub(block, '', text, flags=re.MULTILINE | re.DOTALL)
    by_config: dict[str, list[dict]] = {}
    for entry in entries:
        # A model has one result on a data set: that of its config as it is.
        if entry['metrics'] and entry.get('baseline') and not entry.get('options'):
            by_config.setdefault(entry.get('config'), []).append(entry)

    def with_results(match: re.Match) -> str:
        found = by_config.get(match['config'])
        if not found:
            return match[0]
        lines = yaml.safe_dump(
            {'Results': [_metafile_result(entry) for entry in found]},
            sort_keys=False,
            allow_unicode=True,
        )
        indented = ''.join(f'    {line}\n' for line in lines.splitlines())
        return f'{match[0]}{_META_BEGIN}\n{indented}{_META_END}\n'

    return _MODEL.sub(with_results, text)


def _metafile_result(entry: dict) -> dict:
    metrics = {}
    for name, metric in entry['metrics'].items():
        percent = 100 if name in ('mAP', 'AP50') else 1
        digits = 1 if percent == 100 else 4
        metrics[_METAFILE_METRICS.get(name, name)] = round(
            percent * metric['mean'], digits
        )
    task = _TASKS[entry['task']]
    return {'Task': task, 'Dataset': entry['dataset'], 'Metrics': metrics}
