"""What tests do with a page that is open in a browser."""

import json


def open_page(driver, path):
    driver.get(path.as_uri())
    return lambda script, *args: driver.execute_script(f'return {script}', *args)


def find(driver, selector):
    return driver.find_elements('css selector', selector)


def click(driver, element):
    """Clicks where the header that stays on top does not cover it."""
    driver.execute_script('arguments[0].scrollIntoView({block: "center"})', element)
    element.click()


def errors(driver):
    return [line['message'] for line in driver.get_log('browser')]


def requests(driver):
    """Addresses that pages asked for since the last call."""
    events = [
        json.loads(x['message'])['message'] for x in driver.get_log('performance')
    ]
    return [
        event['params']['request']['url']
        for event in events
        if event['method'] == 'Network.requestWillBeSent'
    ]


def prefer(driver, scheme):
    """Tells pages that the system is ``'light'`` or ``'dark'``."""
    feature = dict(name='prefers-color-scheme', value=scheme)
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[feature]))
