"""The leaderboard's pages in a real browser."""

import json
import shutil
from pathlib import Path

import pytest
from browser import click, errors, find, open_page

from man_mm.leaderboard.commands import present_command
from man_mm.leaderboard.entries import read_entries
from man_mm.leaderboard.site import make_rows

BOARD = 'leaderboard/index.html'
MAN = 'super-resolution/srresnet_x2_photos-man'


@pytest.fixture(scope='module')
def rows():
    return make_rows(list(read_entries(Path('.')).values()))


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


def test_the_board_is_sorted_and_filtered(site, rows, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / BOARD)
    assert shown(run) == [row['id'] for row in rows]
    assert run('document.getElementById("count").textContent') == (
        f'{len(rows)} of {len(rows)}'
    )

    (time,) = find(driver, 'th[data-key=time] button')
    for direction, sign in (('ascending', 1), ('descending', -1)):
        click(driver, time)
        header = find(driver, 'th[data-key=time]')[0]
        assert header.get_attribute('aria-sort') == direction
        assert len(find(driver, '[aria-sort]')) == 1
        by_id = {row['id']: row['time'] for row in rows}
        times = [by_id[name] for name in shown(run)]
        known = [value for value in times if value is not None]
        assert known == sorted(known, reverse=sign < 0)
        assert times[: len(known)] == known  # unknown ones are last

    click(driver, find(driver, 'input[value=super-resolution] + span')[0])
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
    click(driver, find(driver, '#filters button[type=reset]')[0])
    assert run('new Promise(done => setTimeout(done, 50))') is None
    assert len(shown(run)) == len(rows)
    assert errors(driver) == []


def test_the_plot_shows_what_the_filters_leave(site, rows, drivers):
    driver = drivers(1280)
    run = open_page(driver, site / BOARD)

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
    run = open_page(drivers(1280), site / BOARD)
    points = [dict(x=x, y=y) for x, y in ((1, 3), (2, 2), (2, 4), (3, 2.5), (4, 1))]
    for up, expected in ((False, [1, 2, 4]), (True, [1, 2])):
        front = run('frontOf(arguments[0], arguments[1])', points, up)
        assert [point['x'] for point in front] == expected


def test_a_page_has_curves_and_its_command(site, drivers):
    entry = json.loads(Path(f'benchmarks/results/{MAN}.json').read_text())
    driver = drivers(1280)
    run = open_page(driver, site / f'leaderboard/entries/{entry["id"]}.html')
    assert len(find(driver, '.curves .line')) == 2  # its own, and the baseline's
    command = run('document.getElementById("command").textContent')
    assert command == present_command(entry['command'])
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


@pytest.mark.parametrize('page', [BOARD, f'leaderboard/entries/{Path(MAN).name}.html'])
def test_phones_scroll_down_only(site, drivers, page):
    driver = drivers(390)
    run = open_page(driver, site / page)
    assert run('innerWidth') == 390
    assert run('document.documentElement.scrollWidth') == 390
    assert errors(driver) == []


def test_phones_sort_by_a_list(site, drivers):
    run = open_page(drivers(390), site / BOARD)
    before = shown(run)
    choose(run, '#sort', 'model')
    assert shown(run) != before and set(shown(run)) == set(before)


def test_console_errors_are_seen(site, drivers, tmp_path):
    broken = tmp_path / 'site'
    shutil.copytree(site, broken)
    (broken / 'assets/leaderboard/front.js').write_text('throw new Error("broken");')
    driver = drivers(1280)
    open_page(driver, broken / BOARD)
    assert any('broken' in message for message in errors(driver))
