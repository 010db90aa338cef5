"""The report in a real browser: what a reader sees, drags, types and plays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from luve_lightning.cli.report import read_result_table
from luve_lightning.reporting.report import PageText, ReportInputs, build_report
from luve_lightning.reporting.videos import Comparison
from tests.helpers.browser import (
    DESK,
    PHONE,
    accessibility_faults,
    leave,
    low_contrasts,
    open_browser,
    overflow,
    requested,
    resize,
)
from tests.helpers.report_inputs import write_results, write_run, write_spectra, write_videos
from tests.helpers.waiting import wait_for


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    dark, light = write_videos(folder / "videos")
    inputs = ReportInputs(
        {"experts": write_results(folder / "results"), "absent": folder / "absent.csv"},
        {"adaptation": write_run(folder / "run")},
        {"mini": write_spectra(folder / "spectra")},
        {"rooms": Comparison(dark, light, ("dark", "light"), caption="<i>two</i> rooms")},
        {"dark": dark, "light": light},
    )
    page = folder / "report.html"
    text = PageText("A report", "mini numbers", {"date": "2026-11-22", "revision": "f00d", "command": "luve report"})
    page.write_text(build_report(inputs, text, read_result_table).html)
    return page.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    leave(browser)
    resize(browser, DESK)
    browser.get(address)
    return browser


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def divider(page: Any) -> int:
    return int(one(page, ".divider").get_attribute("aria-valuenow"))


@pytest.mark.slow
def test_it_loads_without_an_error_and_asks_for_nothing(page: Any, address: str) -> None:
    assert page.title == "A report"
    time.sleep(0.3)
    assert page.get_log("browser") == []
    assert requested(page) == [address]
    resources = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in resources if not name.startswith("data:")] == []
    policy = one(page, "meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_policy_stops_what_a_caption_might_smuggle_in(page: Any) -> None:
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.smuggled = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert wait_for(lambda: len(page.get_log("browser")) >= 1)
    assert page.execute_script("return window.smuggled") is None


@pytest.mark.slow
def test_the_divider_is_dragged(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    assert divider(page) == 50
    shown = one(page, ".pair:not([hidden]) .right")
    before = page.execute_script("return getComputedStyle(arguments[0]).clipPath", shown)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(page, ".stage"))
    width = one(page, ".viewport").size["width"]
    ActionChains(page).click_and_hold(one(page, ".divider")).move_by_offset(width // 4, 0).release().perform()
    assert divider(page) == pytest.approx(75, abs=1)
    assert page.execute_script("return getComputedStyle(arguments[0]).clipPath", shown) != before
    assert "75 % dark, 25 % light" in one(page, ".divider").get_attribute("aria-valuetext")
    # A press on the picture itself brings the divider there; past the edge it stays on the picture.
    ActionChains(page).move_to_element_with_offset(one(page, ".viewport"), -width // 4, 60).click().perform()
    assert divider(page) == pytest.approx(25, abs=1)
    past = -width // 4 - 15
    ActionChains(page).click_and_hold(one(page, ".divider")).move_by_offset(past, 0).release().perform()
    assert divider(page) == 0


def test_the_divider_is_moved_by_a_finger(page: Any) -> None:
    resize(page, PHONE, mobile=True)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(page, ".stage"))
        box = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", one(page, ".viewport"))
        y = box["y"] + box["height"] / 2
        for kind, share in (("touchStart", 0.5), ("touchMove", 0.3), ("touchMove", 0.2), ("touchEnd", None)):
            points = [] if share is None else [{"x": box["x"] + share * box["width"], "y": y}]
            page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert divider(page) == pytest.approx(20, abs=2)
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_the_divider_is_moved_by_keys(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    handle = one(page, ".divider")
    assert handle.get_attribute("role") == "slider"
    for keys, expected in (
        ([Keys.ARROW_RIGHT, Keys.ARROW_RIGHT], 52),
        ([Keys.ARROW_LEFT], 51),
        ([Keys.PAGE_UP], 61),
        ([Keys.HOME], 0),
        ([Keys.ARROW_DOWN], 0),
        ([Keys.END], 100),
    ):
        for key in keys:
            handle.send_keys(key)
        assert divider(page) == expected
    assert page.execute_script("return document.activeElement.classList.contains('divider')")
    assert page.execute_script("return getComputedStyle(document.querySelector('.grip')).outlineStyle") == "solid"


def test_it_zooms_and_the_cut_stays_under_the_divider(page: Any) -> None:
    canvas, viewport = one(page, ".canvas"), one(page, ".viewport")
    height = viewport.size["height"]
    one(page, "[data-zoom=in]").click()
    one(page, "[data-zoom=in]").click()
    assert canvas.size["width"] == pytest.approx(4 * viewport.size["width"], abs=4)
    assert viewport.size["height"] == height
    assert one(page, ".tools output").text == "4x"
    # The middle of the picture is still in the middle, and so is the cut: clipped are 50 % of the whole picture.
    cut = "return parseFloat(getComputedStyle(document.querySelector('.canvas')).getPropertyValue('--cut'))"
    assert page.execute_script(cut) == pytest.approx(50, abs=1)
    page.execute_script("arguments[0].scrollLeft = 0", viewport)
    assert wait_for(lambda: abs(page.execute_script(cut) - 12.5) < 1), page.execute_script(cut)
    viewport.send_keys("-")
    assert one(page, ".tools output").text == "2x"
    viewport.send_keys("0")
    assert not one(page, "[data-zoom=out]").is_enabled()
    assert overflow(page) == 0


def test_another_frame_is_shown(page: Any) -> None:
    buttons = page.find_elements("css selector", "[data-show]")
    assert [button.get_attribute("data-show") for button in buttons] == ["0", "12", "23"]
    buttons[2].click()
    visible = [i for i in page.find_elements("css selector", ".compare img") if i.is_displayed()]
    assert [image.get_attribute("alt") for image in visible] == ["dark, frame 23", "light, frame 23"]
    loaded = "return arguments[0].complete && arguments[0].naturalWidth"
    assert [page.execute_script(loaded, image) for image in visible] == [16, 32]
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "false", "true"]


def test_the_videos_play(page: Any) -> None:
    videos = page.find_elements("css selector", "video")
    assert len(videos) == 2
    for video in videos:
        assert page.execute_script("return [arguments[0].muted, arguments[0].paused]", video) == [True, True]
        page.execute_script("arguments[0].play()", video)
        begun = wait_for(lambda video=video: page.execute_script("return arguments[0].currentTime > 0.2", video))
        assert begun, page.execute_script("return arguments[0].error?.message", video)
        assert page.execute_script("return arguments[0].playsInline && arguments[0].controls", video)
        page.execute_script("arguments[0].pause()", video)
    assert page.get_log("browser") == []


def test_a_table_is_sorted_by_its_heads(page: Any) -> None:
    def titles() -> list[str]:
        return [
            cell.get_attribute("data-value") for cell in one(page, ".results tbody").find_elements("css selector", "th")
        ]

    assert titles() == ["bare & title", "a<b> & title", "full & title"]
    paper = next(b for b in page.find_elements("css selector", ".results .paper button") if b.text == "FID_patch")
    paper.click()
    assert titles() == ["full & title", "bare & title", "a<b> & title"]
    head = paper.find_element("xpath", "..")
    assert head.get_attribute("aria-sort") == "ascending"
    paper.click()
    assert titles() == ["a<b> & title", "bare & title", "full & title"]
    difference = next(
        b for b in page.find_elements("css selector", ".results button") if b.text.startswith("Difference")
    )
    difference.click()
    assert titles()[-1] == "full & title", "the reference row's difference is 0, the others' are below"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(page: Any, scheme: str) -> None:
    resize(page, PHONE, mobile=True, scheme=scheme)
    assert page.execute_script("return innerWidth") == PHONE[0]
    assert overflow(page) == 0
    assert low_contrasts(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_alternatives_headings_and_contrast(page: Any, scheme: str) -> None:
    resize(page, DESK, scheme=scheme)
    assert accessibility_faults(page) == []
    assert low_contrasts(page) == []


def test_the_checks_see_faults(page: Any) -> None:
    page.execute_script(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<button></button><img src=\"data:,\">"
        '<h5>deep</h5><p id="content">twice</p><p id="pale">pale</p>\');'
        "document.querySelector('#pale').style.color = '#bbb';"
        "const wide = document.createElement('div'); wide.style.width = '3000px'; document.body.append(wide);"
        "wide.textContent = 'wide';"
    )
    assert len(accessibility_faults(page)) == 4
    assert len(low_contrasts(page)) == 1
    assert overflow(page) > 0
