"""The study in a real browser: a rater clicks through it, and the saved file tallies to the clicks."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luve_lightning.reporting.study import StudyKey, StudyOptions, build_study
from luve_lightning.reporting.study_answers import read_answers
from tests.helpers.browser import (
    DESK,
    PHONE,
    accessibility_faults,
    downloaded,
    leave,
    low_contrasts,
    open_browser,
    overflow,
    requested,
    resize,
)
from tests.helpers.studies import METHODS, write_method_videos
from tests.helpers.waiting import wait_for


@dataclass(frozen=True)
class Built:
    """A study, the folder that raters get, and where downloads go."""

    key: StudyKey
    folder: Path
    downloads: Path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("browser")
    with open_browser(folder) as opened:
        yield opened, folder / "downloads"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, browser: tuple[Any, Path]) -> Built:
    folder = tmp_path_factory.mktemp("study")
    sets = write_method_videos(folder / "in", 3)
    options = StudyOptions(raters=4, repeats=0.34, seed=1)
    key = build_study(sets, folder / "out", folder / "key.json", options).key
    return Built(key, folder / "out", browser[1])


@pytest.fixture
def page(browser: tuple[Any, Path]) -> Any:
    leave(browser[0])
    resize(browser[0], DESK)
    return browser[0]


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def shown_files(page: Any) -> list[str]:
    return page.execute_script(
        "return Array.from(document.querySelectorAll('video')).map((v) => v.src.split('/').pop())"
    )


def answer(page: Any, key: StudyKey, item: int, method: int) -> None:
    """Chooses a method on every axis, by where its video is shown."""
    position = shown_files(page).index(key.files[item][method])
    for axis in key.axes:
        page.find_elements("css selector", f"[name={axis}]")[position].click()


@pytest.mark.slow
def test_clicks_become_a_file_that_tallies_to_them(page: Any, built: Built) -> None:
    key, rater = built.key, 2
    began = time.monotonic()
    page.get(f"{(built.folder / 'index.html').as_uri()}?rater={rater}")
    one(page, "#begin").click()
    wanted = {}
    for number, trial in enumerate(key.plans[rater - 1]):
        assert one(page, "#trial-heading").text == f"Group {number + 1} of {len(key.plans[1])}"
        assert shown_files(page) == [key.files[trial.item][method] for method in trial.order]
        assert one(page, "#prompt").text.endswith("</script> & more")
        method = (trial.item + number) % 4
        answer(page, key, trial.item, method)
        wanted |= {(number, axis): method for axis in key.axes}
        one(page, "#next").click()
    assert one(page, "#end").is_displayed()
    one(page, "#end [data-save]").click()
    name = f"answers-{key.study}-rater-002.json"
    assert downloaded(built.downloads / name)
    (read,) = read_answers(built.downloads, key).raters
    assert (read.rater, read.choices) == (rater, wanted)
    assert not read_answers(built.downloads, key).notes
    assert page.get_log("browser") == []
    assert all(url.startswith(built.folder.as_uri()) for url in requested(page))
    seconds = [a["seconds"] for a in json.loads((built.downloads / name).read_text())["answers"]]
    assert all(value > 0 for value in seconds)
    assert sum(seconds) < time.monotonic() - began + 0.1 * len(seconds), "each is rounded"


@pytest.mark.slow
def test_it_goes_on_where_it_was_left_and_answers_can_be_changed(page: Any, built: Built) -> None:
    address = f"{(built.folder / 'index.html').as_uri()}?rater=3"
    first, second = built.key.plans[2][:2]
    page.get(address)
    one(page, "#begin").click()
    answer(page, built.key, first.item, 0)
    one(page, "#next").click()
    one(page, "[name=details]").click()
    page.get(address)
    assert one(page, "#begin").text == "Go on"
    one(page, "#begin").click()
    assert one(page, "#trial-heading").text.startswith("Group 2")
    assert one(page, "[name=details]").is_selected()
    one(page, "#next").click()
    assert "Not answered yet: Which video do you like best overall?" in one(page, "#missing").text
    assert page.switch_to.active_element.get_attribute("name") == "overall"
    one(page, "#back").click()
    answer(page, built.key, first.item, 3)
    one(page, "#where [data-save]").click()
    name = f"answers-{built.key.study}-rater-003.json"
    assert downloaded(built.downloads / name)
    saved = {r.rater: r for r in read_answers(built.downloads, built.key).raters}[3]
    assert {saved.choices[0, axis] for axis in built.key.axes} == {3}
    assert saved.choices[1, "details"] == second.order[0]
    # Another rater on the same device begins anew.
    page.get(address.replace("rater=3", "rater=4"))
    assert one(page, "#begin").text == "Begin"


def test_without_a_number_it_asks_for_one(page: Any, built: Built) -> None:
    page.get((built.folder / "index.html").as_uri())
    one(page, "#begin").click()
    assert one(page, "#wrong").text == "Please give your number, from 1 to 4."
    one(page, "#rater").send_keys("9\n")
    assert not one(page, "#trial").is_displayed()
    one(page, "#rater").clear()
    one(page, "#rater").send_keys("1\n")
    assert one(page, "#trial").is_displayed()
    assert one(page, "#who").text == "Rater 1."


def test_keys_are_enough(page: Any, built: Built) -> None:
    from selenium.webdriver.common.keys import Keys

    page.get(f"{(built.folder / 'index.html').as_uri()}?rater=4")
    one(page, "#begin").send_keys(Keys.ENTER)
    assert page.execute_script("return document.activeElement.id") == "trial-heading"
    for axis in built.key.axes:
        one(page, f"[name={axis}]").send_keys(Keys.SPACE, Keys.ARROW_RIGHT)
    assert [e.get_attribute("value") for e in page.find_elements("css selector", ":checked")] == ["1"] * 4
    one(page, "[data-enlarge]").send_keys(Keys.ENTER)
    assert [v.is_displayed() for v in page.find_elements("css selector", "video")] == [True, False, False, False]
    one(page, "[data-enlarge]").send_keys(Keys.ENTER)
    one(page, "#next").send_keys(Keys.ENTER)
    assert one(page, "#trial-heading").text.startswith("Group 2")


@pytest.fixture
def served(built: Built) -> Iterator[str]:
    """The folder on a web server, as raters meet it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64  # over the usual five, the page's many questions at once would wait for seconds

    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built.folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_on_a_web_server_the_videos_play_and_nothing_names_a_method(page: Any, built: Built, served: str) -> None:
    page.get(f"{served}?rater=1")
    one(page, "#begin").click()
    # What was played of each, seconds: they loop, so that where they are now says less.
    played = (
        "return Array.from(document.querySelectorAll('video')).map("
        "(v) => v.error ? -1 : v.played.length ? v.played.end(0) : 0)"
    )
    assert wait_for(lambda: all(value > 0.1 for value in page.execute_script(played))), (
        page.execute_script(played),
        page.get_log("browser"),
        requested(page),
    )
    one(page, "#play").click()
    assert page.execute_script("return Array.from(document.querySelectorAll('video')).every((v) => v.paused)")
    assert [url for url in requested(page) if not url.startswith(served)] == []
    assert page.get_log("browser") == []
    text = page.execute_script("return document.documentElement.outerHTML").lower()
    assert not [method for method in METHODS if method in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_whole_and_every_control_has_a_name(page: Any, built: Built, scheme: str) -> None:
    resize(page, PHONE, mobile=True, scheme=scheme)
    page.get(f"{(built.folder / 'index.html').as_uri()}?rater=1")
    one(page, "#begin").click()
    one(page, "#next").click()  # the message on what is missing is there too
    assert overflow(page) == 0
    assert accessibility_faults(page) == []
    assert low_contrasts(page) == []
    tops = {v.location["y"] for v in page.find_elements("css selector", "video")}
    assert len(tops) == 2, "two rows of two"
