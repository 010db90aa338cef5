"""The folder that raters are given, and the key that they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.data.video_files import read_video
from luve_lightning.reporting.study import StudyOptions, build_study, read_key
from tests.helpers.run_luve import run_luve
from tests.helpers.studies import METHODS, write_method_videos

OPTIONS = StudyOptions(raters=3, repeats=0.4, seed=5)


def every_file(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_that_raters_get_names_a_method_or_a_source(tmp_path: Path) -> None:
    built = build_study(write_method_videos(tmp_path / "in", 5), tmp_path / "out", tmp_path / "key.json", OPTIONS)
    files = every_file(tmp_path / "out")
    assert len(files) == 1 + 5 * 4
    for name, content in files.items():
        for word in (*METHODS, *built.key.items):
            assert word.encode() not in content.lower(), name
            assert word not in name
    key = (tmp_path / "key.json").read_text()
    assert all(method in key for method in METHODS)
    assert read_key(tmp_path / "key.json") == built.key


def test_the_key_says_which_video_is_which(tmp_path: Path) -> None:
    sets = write_method_videos(tmp_path / "in", 3)
    key = build_study(sets, tmp_path / "out", tmp_path / "key.json", OPTIONS).key
    for item, files in zip(key.items, key.files, strict=True):
        for method, file in zip(key.methods, files, strict=True):
            shown, fps = read_video(tmp_path / "out" / "videos" / file)
            source, _ = read_video(sets.methods[method][item])
            assert fps == 8
            assert np.abs(shown.astype(int) - source.astype(int)).max() <= 6, "visually lossless"
    # The page's plan and the key's tell the same, by file names.
    page = (tmp_path / "out" / "index.html").read_text()
    data = json.loads(page.split('id="study">')[1].split("</script>")[0])
    assert data["study"] == key.study
    for rater, plan in enumerate(key.plans):
        for trial, (item, order) in zip(plan, data["plans"][rater], strict=True):
            assert [data["items"][item]["files"][n] for n in order] == [key.files[item][m] for m in trial.order]
            assert data["items"][item]["files"] == sorted(key.files[item])
    assert data["items"][0]["prompt"].endswith("</script> & more")


def test_an_interrupted_build_goes_on_and_writes_the_same(tmp_path: Path) -> None:
    sets = write_method_videos(tmp_path / "in", 3)
    first = build_study(sets, tmp_path / "out", tmp_path / "key.json", OPTIONS)
    files = every_file(tmp_path / "out")
    assert first.written == 12
    (tmp_path / "out" / "index.html").unlink()
    removed = sorted((tmp_path / "out" / "videos").iterdir())[:5]
    for path in removed:
        path.unlink()
    (tmp_path / "out" / "videos" / ".x.mp4.12.tmp").write_bytes(b"half")
    again = build_study(sets, tmp_path / "out", tmp_path / "key.json", OPTIONS)
    assert again.written == 5
    assert every_file(tmp_path / "out") == files


def test_videos_that_not_every_method_has_are_left_out(tmp_path: Path) -> None:
    sets = write_method_videos(tmp_path / "in", 3)
    del sets.methods["plainlora"]["item-1"]
    built = build_study(sets, tmp_path / "out", tmp_path / "key.json", OPTIONS)
    assert built.key.items == ("item-0", "item-2")
    assert built.left_out == {"item-1": "not of plainlora"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key=HERE/out/key.json"], "is inside HERE/out, which raters see"),
        (["--items=9"], "items: 9, but every method has only 2 videos"),
        (["--repeats=2"], "repeats: expected a share of the items from 0 to 1, got 2"),
        (["--raters=0"], "raters: expected at least 1"),
        (["--axes=[details,beauty]"], "axes: expected some of overall, details, temporal, text, got details, beauty"),
        (["--title=Is OurMethod best?"], "the method ourmethod is named in a text that raters see"),
        (["--output=HERE/in"], "has files of something else"),
        (["--videos.interpolated=null", "--videos.ourmethod=null"], "expected 2 to 9 methods, got 1"),
        (["--prompts=HERE/prompts.csv"], "prompts: 1 video has none (item-1); give --prompts, or --axes without text"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    write_method_videos(tmp_path / "in", 2, METHODS[:3])
    (tmp_path / "prompts.csv").write_text("name,prompt\nitem-0,a cat\n")
    words = [f"--videos={method}={tmp_path / 'in' / method}" for method in METHODS[:3]]
    options = [option.replace("HERE", str(tmp_path)) for option in options]
    outcome = run_luve(capsys, "study", "build", *words, f"--output={tmp_path / 'out'}", *options)
    assert outcome.code == 2, outcome.err
    (line,) = outcome.error_lines
    assert message.replace("HERE", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()
