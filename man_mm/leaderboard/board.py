"""What is done with the leaderboard: entries are added, checked, and written out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .adding import make_entries, read_given, sources_of, write_entry
from .documents import (
    documents,
    unclosed_markers,
    unmarked_numbers,
    update_documents,
)
from .entries import EntryError, read_entries
from .tables import TableError
from .validation import find_errors


def validate(root: Path) -> list[str]:
    """What is wrong with the entries, one line each."""
    try:
        return find_errors(read_entries(root), root)
    except EntryError as error:
        return [str(error)]


def add(
    paths: Sequence[Path],
    root: Path,
    words: dict | None = None,
    with_times: bool = True,
) -> list[Path]:
    """Adds entries, or updates them; all of them, or none if one is refused.

    Args:
        paths: Result files, folders of them, or finished entries. None means the result
            files of all measured entries.
        root: The repository.
        words: Fields that result files do not say.
        with_times: Whether times of steps are used.

    Returns:
        The files that were written.

    Raises:
        EntryError: If an entry is refused; the message says why.
    """
    known = read_entries(root)
    given, raw = {}, []
    for path in paths:
        found = read_given(path, root)
        if found:
            given[found[0]] = found[1]
        else:
            raw.append(path)
    if not paths:
        raw = sources_of(list(known.values()), root)
    made = given | make_entries(raw, known, root, words, with_times)
    names = {str(path.relative_to(root)) for path in made}
    errors = [
        error
        for error in find_errors(known | made, root)
        if error.partition(':')[0] in names
    ]
    if errors:
        raise EntryError('\n'.join(errors))
    for path, entry in made.items():
        write_entry(path, entry)
    return list(made)


def build(root: Path) -> list[Path]:
    """Writes the generated parts of documents and metafiles.

    Args:
        root: The repository.

    Returns:
        The documents and metafiles that changed.

    Raises:
        EntryError: If there is a bad entry.
        TableError: If a marker names no results.
    """
    errors = validate(root)
    if errors:
        raise EntryError('\n'.join(errors))
    entries = list(read_entries(root).values())
    changed = []
    for path, text in update_documents(root, entries).items():
        if text != path.read_text('utf-8'):
            path.write_text(text, 'utf-8')
            changed.append(path)
    return changed


def check(root: Path) -> list[str]:
    """What `build` would change, bad entries, and numbers that have no source.

    Returns:
        One line for each error.
    """
    errors = validate(root)
    if errors:
        return errors
    try:
        texts = update_documents(root, list(read_entries(root).values()))
    except TableError as error:
        return [str(error)]
    for path, expected in texts.items():
        name, text = path.relative_to(root), path.read_text('utf-8')
        if text != expected:
            errors.append(f'{name}: {_first_difference(text, expected)}')
    for path in documents(root):
        name, text = path.relative_to(root), path.read_text('utf-8')
        for line in unclosed_markers(text):
            errors.append(f'{name}: {line!r} has no partner')
        for row in unmarked_numbers(text):
            errors.append(
                f'{name}: {row!r} comes from no result file: put it there, and the '
                'table between markers'
            )
    return errors


def _first_difference(text: str, expected: str) -> str:
    lines, wanted = text.splitlines(), expected.splitlines()
    for number, (line, want) in enumerate(zip(lines, wanted, strict=False), 1):
        if line != want:
            return f'line {number} is {line!r}, but the results give {want!r}'
    return f'{len(lines)} lines, but the results give {len(wanted)}'
