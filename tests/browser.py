"""A real headless Chromium for the tests of the report's page, and what it shows of it."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --force-device-scale-factor=1"
)
MISSING = "Chromium is not installed: apt-get install chromium chromium-driver"


def require_chromium() -> tuple[str, str]:
    """Paths of Chromium and its driver; without them a test is skipped, and fails where CI=true."""
    found = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if None in found:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
    return found


@contextmanager
def open_browser(profile: Path):
    """A Selenium driver of a Chromium with an empty profile, which logs its console and all that it asks for."""
    binary, driver = require_chromium()
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(executable_path=driver))  # named, so that nothing is downloaded
    try:
        yield browser
    finally:
        browser.quit()


def set_screen(browser, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
    """The size of the screen in CSS pixels, whether it is touched, and the color scheme that the reader prefers."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def find(browser, selector: str):
    return browser.find_elements("css selector", selector)


def settle(browser) -> None:
    """Two frames: moves of a pointer reach the page with the next frame, not at once."""
    browser.execute_script("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def tokens_of(browser, pane: int):
    return find(find(browser, ".tokens")[pane], ".token")


def selected(browser) -> list[str]:
    """Text of the token under the cursor in each pane, None where the completion has ended."""
    settle(browser)
    chosen = [find(tokens, '[aria-selected="true"]') for tokens in find(browser, ".tokens")]
    return [own[0].get_property("textContent") if own else None for own in chosen]


def text_of(browser, node) -> str:
    return browser.execute_script("return arguments[0].textContent.toWellFormed()", node)


def actions(browser):
    """Selenium's chain of pointer and key actions, without delays."""
    return ActionChains(browser, duration=0)


def press(browser, *keys: str) -> None:
    actions(browser).send_keys(*keys).perform()


def point(browser, node) -> None:
    actions(browser).move_to_element(node).perform()


def focus(browser, selector: str, index: int = 0) -> None:
    browser.execute_script("arguments[0].focus()", find(browser, selector)[index])
