"""Pages of the site in a real browser, opened as files."""

import pytest
from browser import errors, find, open_page, prefer, requests

PAGES = ('index', 'memory', 'options', 'methods/man', 'api/core', 'documents')
PAGES += ('files/man_mm/core/bank.py',)


def wait_for(driver, selector, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(
        lambda _: [x for x in find(driver, selector) if x.is_displayed()]
    )


def is_too_wide(run):
    root = 'document.documentElement'
    return run(f'{root}.scrollWidth > {root}.clientWidth')


def from_elsewhere(addresses):
    return [x for x in addresses if not x.startswith(('file:', 'data:'))]


@pytest.mark.parametrize('page', PAGES)
@pytest.mark.parametrize('width', [1280, 390])
def test_pages_fit_the_screen_and_load_nothing_else(site, drivers, page, width):
    driver = drivers(width)
    requests(driver)
    run = open_page(driver, site / f'{page}.html')
    assert run('innerWidth') == width and not is_too_wide(run)
    loaded = requests(driver)
    assert len(loaded) > 3 and from_elsewhere(loaded) == []
    assert errors(driver) == []


def test_a_page_that_is_wide_and_loads_more(drivers, tmp_path):
    driver, page = drivers(1280), tmp_path / 'page.html'
    image = 'http://127.0.0.1:9/image.png'
    page.write_text(f'<p style="width: 2000px"><img src="{image}">')
    requests(driver)
    assert is_too_wide(open_page(driver, page))
    assert from_elsewhere(requests(driver)) == [image]
    assert errors(driver)


def test_names_of_rows_stay_where_a_table_is_scrolled(site, drivers):
    run = open_page(drivers(390), site / 'partitions.html')
    table = (
        '[...document.querySelectorAll(".md-typeset__scrollwrap")]'
        '.find(box => box.scrollWidth > box.clientWidth)'
    )
    cell = 'querySelector("td:nth-child(%d)").getBoundingClientRect().left'
    run(f'{table}.scrollLeft = 100')
    assert run(f'{table}.{cell % 1}') >= 0
    before = run(f'{table}.{cell % 2}')
    run(f'{table}.scrollLeft = 0')
    assert run(f'{table}.{cell % 2}') == before + 100  # the other columns moved


def test_the_search_works_without_a_server(site, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / 'index.html')
    (box,) = find(driver, 'input[name=query]')
    box.click()
    box.send_keys('micro_batch_size')
    links = wait_for(driver, '.md-search-result__link')
    assert any('options.html' in link.get_attribute('href') for link in links)
    assert run('"IFrameWorker" in window')
    assert errors(driver) == []


def test_dark_and_light(site, drivers):
    driver = drivers(1280)
    colour = 'getComputedStyle(document.body).backgroundColor'
    colours = []
    for scheme in ('light', 'dark'):
        prefer(driver, scheme)
        run = open_page(driver, site / 'index.html')
        run('localStorage.clear()')
        run = open_page(driver, site / 'index.html')
        colours.append(run(colour))
    assert colours[0] != colours[1]
    (button,) = wait_for(driver, '[data-md-component=palette] label')
    button.click()
    # Other pages remember it, and the leaderboard's follow.
    run = open_page(driver, site / 'leaderboard/index.html')
    assert run(colour) == colours[0]
    panel = 'getComputedStyle(document.querySelector(".lb .panel")).colorScheme'
    assert run(panel) == 'light'
    run('localStorage.clear()')
    assert open_page(driver, site / 'leaderboard/index.html')(panel) == 'dark'
    prefer(driver, 'light')
