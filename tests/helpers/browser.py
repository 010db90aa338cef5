"""A real browser for the tests of pages: headless Chromium, driven by Selenium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waiting import wait_for

CHECKS = Path(__file__).with_name("page_checks.js")
HOW_TO = "Debian and Ubuntu: apt-get install chromium chromium-driver"
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PHONE, DESK = (360, 740), (1200, 900)


@contextmanager
def open_browser(folder: Path) -> Iterator[Any]:
    """A browser with a fresh profile that saves downloads into `folder/downloads`.

    Skips the test where there is no Chromium or no chromedriver: nothing is downloaded to have one.
    """
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(f"no {'chromedriver' if browser else 'Chromium'} on this machine ({HOW_TO})")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def resize(browser: Any, size: tuple[int, int], mobile: bool = False, scheme: str = "light") -> None:
    """Emulates a screen of width x height CSS pixels."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def downloaded(file: Path) -> bool:
    """Whether a download has come, whole: the browser reserves its name before it has its bytes."""
    return wait_for(lambda: file.is_file() and file.stat().st_size > 0 and not list(file.parent.glob("*.crdownload")))


def requested(browser: Any) -> list[str]:
    """Addresses that were asked for since the last call, those inside the page (data:, blob:) left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


def leave(browser: Any) -> None:
    """Ends the page that is open, so that nothing of it comes later, and forgets what it logged and asked for."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")


def overflow(browser: Any) -> int:
    """How many pixels the page is wider than the screen."""
    return int(
        browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    )


def accessibility_faults(browser: Any) -> list[str]:
    """Controls and regions without a name, pictures without a text, dangling or doubled ids, skipped headings."""
    return list(browser.execute_script(f"{CHECKS.read_text()}return accessibilityFaults();"))


def low_contrasts(browser: Any) -> list[str]:
    """Texts whose contrast with what is behind them is below 4.5:1."""
    return list(browser.execute_script(f"{CHECKS.read_text()}return lowContrasts();"))
