"""The leaderboard's pages as they are given to the site."""

from pathlib import Path

from man_mm.leaderboard.entries import read_entries
from man_mm.leaderboard.site import TEMPLATES, make_rows, render_pages


def test_every_entry_has_a_page():
    entries = read_entries(Path('.'))
    pages = render_pages(list(entries.values()), Path('.'))
    assert set(pages) == {'index', *(f'entries/{path.stem}' for path in entries)}


def test_methods_of_the_first_plot_have_different_colours():
    rows = make_rows(list(read_entries(Path('.')).values()))
    style = (TEMPLATES / 'board.css').read_text('utf-8')
    for row in rows:
        assert f'.m{row["colour"]} {{ --c' in style
    shown = {
        x['method']: x['colour'] for x in rows if None not in (x['memory'], x['time'])
    }
    assert len(set(shown.values())) == len(shown) > 4


def test_text_of_entries_is_no_markup():
    entries = list(read_entries(Path('.')).values())
    entry = next(e for e in entries if e['kind'] == 'reported') | dict(
        id='evil', model='</script><b>x', baseline=None
    )
    for page in render_pages([entry], Path('.')).values():
        assert '<b>x' not in page.content + page.title
