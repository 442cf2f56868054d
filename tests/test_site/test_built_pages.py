"""What the built pages contain, and where their links lead."""

import ast
import re
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOMS = ('aux_heads', 'backbones', 'core', 'datasets', 'engine', 'interruptions')
ROOMS += ('measure', 'parallel')


class PageReader(HTMLParser):
    """Collects the links, ids and paragraphs of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.ids, self.paragraphs = [], [], set(), []
        self._in_paragraph = False
        self.feed(path.read_text('utf-8'))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get('id'), attributes.get('name')} - {None}
        if tag == 'a' and attributes.get('href'):
            self.links.append(attributes['href'])
        is_loaded = attributes.get('rel') in ('stylesheet', 'icon', 'preconnect')
        if tag == 'link' and is_loaded:
            self.loaded.append(attributes['href'])
        elif tag in ('img', 'script', 'iframe', 'source') and 'src' in attributes:
            self.loaded.append(attributes['src'])
        if tag == 'p':
            self._in_paragraph = True
            self.paragraphs.append('')

    def handle_endtag(self, tag):
        if tag == 'p':
            self._in_paragraph = False

    def handle_data(self, data):
        if self._in_paragraph:
            self.paragraphs[-1] += data


read_page = cache(PageReader)


def pages_of(folder):
    return sorted(path for path in folder.rglob('*.html') if path.name != '404.html')


def is_elsewhere(link):
    return bool(re.match(r'(https?:)?//|mailto:', link))


def broken_links(path):
    """Links and files of a page that are not there."""
    page = read_page(path)
    for link in (*page.links, *page.loaded):
        if is_elsewhere(link) or link.startswith('data:'):
            continue
        name, _, anchor = unquote(link).partition('#')
        target = (path.parent / name) if name else path
        if not target.is_file():
            yield link
        elif anchor and anchor not in read_page(target).ids:
            yield link


def test_every_link_leads_somewhere(site):
    pages = pages_of(site)
    assert len(pages) > 150
    assert {str(p): found for p in pages if (found := list(broken_links(p)))} == {}


def test_links_that_lead_nowhere(site, tmp_path):
    page = tmp_path / 'page.html'
    shutil.copy(site / 'faq.html', tmp_path)
    page.write_text(
        '<a href="gone.html"></a><a href="faq.html#gone"></a><a href="faq.html"></a>'
        '<img src="gone.png"><a href="#here"></a><p id="here"><a href="https://x.y">'
    )
    assert list(broken_links(page)) == ['gone.html', 'faq.html#gone', 'gone.png']


def test_nothing_is_loaded_from_elsewhere(site):
    for path in pages_of(site):
        assert not [x for x in read_page(path).loaded if is_elsewhere(x)], path
    for path in site.rglob('*.css'):
        text = path.read_text('utf-8')
        assert not re.search(r'url\(["\']?(https?:)?//|@import', text), path


def unrendered(path):
    """Paragraphs with marks of Markdown that GitHub renders and mkdocs does not."""
    marks = re.compile(r'```|^\|.*\|$|\n *[-*] |\n *\d\. |^#+ |\]\(', re.MULTILINE)
    return [text for text in read_page(path).paragraphs if marks.search(text)]


def test_lists_tables_and_code_are_rendered(site):
    for path in pages_of(site):
        assert unrendered(path) == [], path


def test_what_is_not_rendered(tmp_path):
    page = tmp_path / 'page.html'
    for text in ('One:\n- a', 'One:\n1. a', '| a |\n|---|', '```bash\nx', '[a](b)'):
        page.write_text(f'<p>{text}</p>')
        assert unrendered(page) == [text]
        read_page.cache_clear()


def exported_names(room):
    """``__all__`` of a room, without importing it, and without its files."""
    tree = ast.parse(Path(f'man_mm/{room}/__init__.py').read_text('utf-8'))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == '__all__'
    )
    return [n for n in names if not Path(f'man_mm/{room}/{n}.py').is_file()]


@pytest.mark.parametrize('room', ROOMS)
def test_the_api_pages_have_every_public_name(site, room):
    found = read_page(site / f'api/{room}.html').ids
    wanted = {f'man_mm.{room}.{name}' for name in exported_names(room)}
    assert wanted and wanted <= found
    assert f'man_mm.{room}.no_such_name' not in found


def test_the_list_of_names_is_complete(site):
    """The table of the API's first page has what `import man_mm` offers."""
    tree = ast.parse(Path('man_mm/__init__.py').read_text('utf-8'))
    names = ast.literal_eval(tree.body[-1].value)
    listed = re.findall(r'`(\w+)`', Path('docs/site/api/index.md').read_text('utf-8'))
    assert sorted(set(names) - {'__version__'}) == sorted(set(listed) & set(names))


def test_the_start_page_has_sections_of_the_readme(site):
    ids = read_page(site / 'index.html').ids
    assert {'install', 'in-plain-pytorch', 'what-it-saves'} <= ids
    assert 'read-these-files-first' not in ids
