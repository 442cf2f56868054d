"""What mkdocs is told beyond mkdocs.yml: pages from outside docs/, and the leaderboard.

The documents are read on GitHub, too, where a link may lead to any file. In the site, a
link to a file outside docs/ leads to a page that shows it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from man_mm.leaderboard.entries import read_entries
from man_mm.leaderboard.site import ASSETS, TEMPLATES, BoardPage, render_pages

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r'\]\(([^)\s]+)\)')
FENCED = re.compile(r'(^ *```.*?^ *```$)', re.MULTILINE | re.DOTALL)
# Where files lie in the site that are not where they lie in docs/.
PLACES = {'README.md': 'index.md', 'docs/README.md': 'documents.md'}
PLACES |= {'CHANGELOG.md': 'changelog.md', 'docs': 'documents.md'}
LANGUAGES = {'.py': 'python', '.sh': 'bash'}

# Of the site that is being built: where the text of each page lies in the repository,
# and the leaderboard's pages; both by the page's place in the site.
origins: dict[str, str] = {}
board: dict[str, BoardPage] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and what they show."""
    origins.clear()
    board.clear()
    files.remove(files.get_file_from_path('README.md'))
    for file in files.documentation_pages():
        origins[file.src_uri] = f'docs/{file.src_uri}'
    for path in _pages_elsewhere():
        origins[place_of(path)] = path
        files.append(
            File.generated(config, place_of(path), abs_src_path=str(ROOT / path))
        )
    for place, path in _copies():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    for path, place, text in list(_shown_files()):
        if (ROOT / path).is_dir():
            origins[place] = f'{path}/.'
        elif path.endswith('.ipynb'):
            origins[place] = path
        files.append(File.generated(config, place, content=text))
    entries = list(read_entries(ROOT).values())
    for name, page in render_pages(entries, ROOT).items():
        board[f'leaderboard/{name}.md'] = page
        head = f'---\ntitle: {json.dumps(page.title)}\nhide: [navigation, toc]\n---\n'
        files.append(File.generated(config, f'leaderboard/{name}.md', content=head))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Brings in sections of the README, and makes links lead to places in the site."""
    place = page.file.src_uri
    if place not in origins:
        return markdown
    readme = (ROOT / 'README.md').read_text('utf-8')

    def section(match: re.Match) -> str:
        return move_links(section_of(readme, match[1]), 'README.md', place)

    markdown = move_links(markdown, origins[place], place)
    return re.sub(r'^<!-- README: (.+) -->$', section, markdown, flags=re.MULTILINE)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Fills the leaderboard's pages, which are no Markdown."""
    found = board.get(page.file.src_uri)
    return found.content if found else html


def place_of(path: str) -> str | None:
    """Where the site has a file or folder of the repository; None if it has not.

    >>> place_of('docs/faq.md')
    'faq.md'
    >>> place_of('man_mm/core/bank.py')
    'files/man_mm/core/bank.py.md'
    """
    if path in PLACES:
        return PLACES[path]
    if path.startswith('docs/'):
        return path.removeprefix('docs/').removeprefix('site/')
    card = re.fullmatch(r'configs/(\w+)(/README\.md)?', path)
    if card and (ROOT / 'configs' / card[1] / 'README.md').is_file():
        return f'methods/{card[1]}.md'
    if path.startswith('..') or not (ROOT / path).exists():
        return None
    return f'files/{path}' if path.endswith('.json') else f'files/{path}.md'


def move_links(text: str, origin: str, place: str) -> str:
    """Text with the links that it needs at another place.

    Args:
        text: Markdown.
        origin: Path of its file in the repository, to which its links are relative.
        place: Path of its page in the site, to which they shall be.
    """

    def move(match: re.Match) -> str:
        path, hash_, anchor = match[1].partition('#')
        if not path or re.match(r'\w+:', path):
            return match[0]
        target = place_of(_resolve(path, origin))
        if target is None:
            return match[0]
        return f']({os.path.relpath(target, os.path.dirname(place))}{hash_}{anchor})'

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(move, part) for part in parts[::2]]
    return ''.join(parts)


def section_of(text: str, heading: str) -> str:
    """A section of a page, with its heading of level 2.

    Raises:
        ValueError: If there is none.
    """
    found = re.search(rf'^## {re.escape(heading)}\n.*?(?=^## |\Z)', text, re.M | re.S)
    if not found:
        raise ValueError(f'README.md has no section {heading!r}.')
    return found[0]


def _resolve(link: str, origin: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(origin), link))


def _pages_elsewhere() -> Iterator[str]:
    """Pages that are in other folders than docs/ itself."""
    yield 'docs/README.md'
    yield 'CHANGELOG.md'
    for pattern in ('docs/site/**/*.md', 'configs/*/README.md'):
        for path in sorted(ROOT.glob(pattern)):
            yield path.relative_to(ROOT).as_posix()


def _copies() -> Iterator[tuple[str, Path]]:
    """Files that are copied as they are: their places, and where they are."""
    for path in sorted((ROOT / 'docs/site/assets').iterdir()):
        yield f'assets/{path.name}', path
    for name in ASSETS:
        yield f'assets/leaderboard/{name}', TEMPLATES / name
    for path in sorted((ROOT / 'benchmarks').rglob('*.json')):
        yield place_of(path.relative_to(ROOT).as_posix()), path


def _shown_files() -> Iterator[tuple[str, str, str]]:
    """Files and folders to which a page links, and those in such folders.

    Yields:
        Where one lies, its place in the site, and the Markdown that shows it.
    """
    waiting = []
    for origin in ('README.md', *origins.values()):
        for link in LINK.findall((ROOT / origin).read_text('utf-8')):
            waiting.append(_resolve(link.partition('#')[0], origin))
    known = set()
    while waiting:
        path = waiting.pop()
        place = place_of(path) or ''
        if path in known or not re.fullmatch(r'files/.+\.md', place):
            continue
        known.add(path)
        yield path, place, _show(path)
        if (ROOT / path).is_dir():
            waiting += [f'{path}/{name}' for name in _names_in(path)]


def _show(path: str) -> str:
    """A file or a folder of the repository as Markdown."""
    file = ROOT / path
    head = '---\nsearch: {exclude: true}\nhide: [toc]\n---\n'
    if file.suffix == '.ipynb':
        return _show_notebook(json.loads(file.read_text('utf-8')))
    if file.is_dir():
        names = ''.join(f'- [{name}]({name})\n' for name in _names_in(path))
        return f'{head}# `{path}/`\n\n{names}'
    language = LANGUAGES.get(file.suffix, 'text')
    return f'{head}# `{path}`\n\n~~~~~~ {language}\n{file.read_text("utf-8")}~~~~~~\n'


def _names_in(path: str) -> list[str]:
    names = sorted(file.name for file in (ROOT / path).iterdir())
    return [name for name in names if not name.startswith(('.', '__pycache__'))]


def _show_notebook(notebook: dict) -> str:
    """The cells of a notebook, which is kept without its output."""
    parts = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        code = cell['cell_type'] == 'code'
        parts.append(f'```python\n{source}\n```' if code else source)
    return '\n\n'.join(parts)
