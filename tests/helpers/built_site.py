"""The built site, and browsers that open it."""

import os
import shutil

import pytest
from filelock import FileLock

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


def build_site(folder):
    """Builds as `mkdocs build` does; fails at the first link that leads nowhere."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config('mkdocs.yml', site_dir=str(folder))
    config.plugins.on_startup(command='build', dirty=False)
    try:
        build(config)
    finally:
        config.plugins.on_shutdown()


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    """Folder of the site, which the first of several test processes builds."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder = base / 'site'
    with FileLock(base / 'site.lock'):
        if not folder.exists():
            build_site(base / 'site.part')
            (base / 'site.part').rename(folder)
    return folder


@pytest.fixture(scope='session')
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
        logs = {'browser': 'ALL', 'performance': 'ALL'}
        options.set_capability('goog:loggingPrefs', logs)
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
