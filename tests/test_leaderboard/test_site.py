"""The leaderboard's pages in a real browser."""

import json
import shutil
from pathlib import Path

import pytest

from man_mm.leaderboard.commands import present_command
from man_mm.leaderboard.entries import read_entries
from man_mm.leaderboard.site import build_site, make_rows

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
MAN = 'super-resolution/srresnet_x2_photos-man'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    build_site(list(read_entries(Path('.')).values()), Path('.'), folder)
    return folder


@pytest.fixture(scope='module')
def rows():
    return make_rows(list(read_entries(Path('.')).values()))


@pytest.fixture(scope='module')
def drivers():
    """Starts browsers of a width; those of a phone's have a phone's screen."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    chromedriver = shutil.which('chromedriver')
    if not (browser and chromedriver):
        pytest.skip('no Chromium: apt-get install chromium chromium-driver')
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    started = {}

    def start(width):
        if width in started:
            return started[width]
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        for argument in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage'):
            options.add_argument(f'--{argument}')
        options.add_argument(f'--window-size={width},1000')
        if width < 500:
            metrics = dict(width=width, height=800, pixelRatio=1)
            options.add_experimental_option(
                'mobileEmulation', dict(deviceMetrics=metrics)
            )
        started[width] = webdriver.Chrome(options, Service(chromedriver))
        return started[width]

    yield start
    for driver in started.values():
        driver.quit()


def open_page(driver, path):
    driver.get(path.as_uri())
    return lambda script, *args: driver.execute_script(f'return {script}', *args)


def find(driver, selector):
    return driver.find_elements('css selector', selector)


def shown(run):
    return run(
        '[...document.querySelectorAll("#board tbody tr")]'
        '.filter(row => !row.hidden).map(row => row.dataset.id)'
    )


def choose(run, selector, value):
    run(
        '(() => { const box = document.querySelector(arguments[0]);'
        'box.value = arguments[1];'
        'box.dispatchEvent(new Event("change", {bubbles: true})); })'
        '.apply(null, arguments)',
        selector,
        value,
    )


def errors(driver):
    return [line['message'] for line in driver.get_log('browser')]


def test_the_site_works_without_a_network(site):
    for path in site.rglob('*'):
        if path.suffix in ('.html', '.css', '.js'):
            for text in ('src="http', 'href="//', 'url(', '@import', 'fetch('):
                assert text not in path.read_text(), path


def test_the_board_is_sorted_and_filtered(site, rows, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / 'index.html')
    assert shown(run) == [row['id'] for row in rows]
    assert run('document.getElementById("count").textContent') == (
        f'{len(rows)} of {len(rows)}'
    )

    (time,) = find(driver, 'th[data-key=time] button')
    for direction, sign in (('ascending', 1), ('descending', -1)):
        time.click()
        header = find(driver, 'th[data-key=time]')[0]
        assert header.get_attribute('aria-sort') == direction
        assert len(find(driver, '[aria-sort]')) == 1
        by_id = {row['id']: row['time'] for row in rows}
        times = [by_id[name] for name in shown(run)]
        known = [value for value in times if value is not None]
        assert known == sorted(known, reverse=sign < 0)
        assert times[: len(known)] == known  # unknown ones are last

    find(driver, 'input[value=super-resolution] + span')[0].click()
    choose(run, '[name=method]', 'MAN')
    wanted = {
        row['id']
        for row in rows
        if row['task'] == 'super-resolution' and row['method'] == 'MAN'
    }
    assert set(shown(run)) == wanted and 0 < len(wanted) < len(rows)
    choose(run, '[name=device]', 'not stated')
    choose(run, '[name=kind]', 'measured')
    assert shown(run) == []
    assert find(driver, '#empty')[0].is_displayed()
    find(driver, 'button[type=reset]')[0].click()
    assert run('new Promise(done => setTimeout(done, 50))') is None
    assert len(shown(run)) == len(rows)
    assert errors(driver) == []


def test_the_plot_shows_what_the_filters_leave(site, rows, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / 'index.html')

    def dots():
        return {x.get_attribute('data-id') for x in find(driver, '#front a')}

    assert dots() == {r['id'] for r in rows if None not in (r['memory'], r['time'])}
    choose(run, '#axis-y', 'gain:PSNR')
    with_psnr = {r['id'] for r in rows if 'PSNR' in r['gains'] and r['memory']}
    assert dots() == with_psnr and with_psnr
    choose(run, '[name=method]', 'MAN')
    assert dots() < with_psnr

    link = next(
        x for x in find(driver, '#front a') if x.get_attribute('data-id') in MAN
    )
    run('arguments[0].focus()', link)  # as by keyboard
    (tip,) = find(driver, '.tip')
    assert (
        tip.is_displayed() and 'SRResNet ×2' in tip.text and 'memory 0.642' in tip.text
    )
    run(
        'arguments[0].querySelector("circle")'
        '.dispatchEvent(new MouseEvent("click", {bubbles: true}))',
        link,
    )
    assert driver.current_url.endswith(f'entries/{Path(MAN).name}.html')
    assert errors(driver) == []


def test_the_front_is_of_those_that_none_beats(site, drivers):
    run = open_page(drivers(1280), site / 'index.html')
    points = [dict(x=x, y=y) for x, y in ((1, 3), (2, 2), (2, 4), (3, 2.5), (4, 1))]
    for up, expected in ((False, [1, 2, 4]), (True, [1, 2])):
        front = run('frontOf(arguments[0], arguments[1])', points, up)
        assert [point['x'] for point in front] == expected


def test_a_page_has_curves_and_its_command(site, drivers):
    entry = json.loads(Path(f'benchmarks/results/{MAN}.json').read_text())
    driver = drivers(1280)
    run = open_page(driver, site / f'entries/{entry["id"]}.html')
    assert len(find(driver, '.curves .line')) == 2  # its own, and the baseline's
    command = run('document.getElementById("command").textContent')
    assert command == present_command(entry['command'])
    (copy,) = find(driver, '#copy')
    copy.click()
    run('new Promise(done => setTimeout(done, 100))')
    assert copy.text in ('Copied', 'Selected')
    text = find(driver, 'main')[0].text
    for part in (
        '6.0 MiB',
        '35.450 ± 0.012',
        'K=4',
        entry['optimizer'],
        entry['commit'],
    ):
        assert part in text
    assert errors(driver) == []


@pytest.mark.parametrize('page', ['index.html', f'entries/{Path(MAN).name}.html'])
def test_phones_scroll_down_only(site, drivers, page):
    driver = drivers(390)
    run = open_page(driver, site / page)
    assert run('innerWidth') == 390
    assert run('document.documentElement.scrollWidth') == 390
    assert errors(driver) == []


def test_phones_sort_by_a_list(site, drivers):
    run = open_page(drivers(390), site / 'index.html')
    before = shown(run)
    choose(run, '#sort', 'model')
    assert shown(run) != before and set(shown(run)) == set(before)


def test_dark_and_light(site, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / 'index.html')
    run('localStorage.clear()')
    colours = []
    for scheme in ('light', 'dark'):
        feature = dict(name='prefers-color-scheme', value=scheme)
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[feature]))
        run = open_page(driver, site / 'index.html')
        colours.append(
            run('getComputedStyle(document.documentElement).backgroundColor')
        )
    assert colours[0] != colours[1]
    find(driver, '#theme')[0].click()
    page = site / f'entries/{Path(MAN).name}.html'  # remembers it
    run = open_page(driver, page)
    now = run('getComputedStyle(document.documentElement).backgroundColor')
    assert now == colours[0]
    run('localStorage.clear()')


def test_console_errors_are_seen(site, drivers, tmp_path):
    broken = tmp_path / 'site'
    shutil.copytree(site, broken)
    (broken / 'front.js').write_text('throw new Error("broken");')
    driver = drivers(1280)
    open_page(driver, broken / 'index.html')
    assert any('broken' in message for message in errors(driver))


def test_text_of_entries_is_no_markup(tmp_path):
    entries = list(read_entries(Path('.')).values())
    entry = next(e for e in entries if e['kind'] == 'reported') | dict(
        id='evil', model='</script><b>x', baseline=None
    )
    build_site([entry], Path('.'), tmp_path)
    for page in tmp_path.rglob('*.html'):
        assert '<b>x' not in page.read_text()
