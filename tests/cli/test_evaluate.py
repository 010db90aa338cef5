"""`luve evaluate` in this process: what it measures, keeps, reports and refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.data import hashes as clip_hashes
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.evaluation.bootstrap import mean_interval, paired_difference
from tests.helpers.evaluation import read_csv, read_json, video, write_methods
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.video_files import set_matrix

COUNT = 5
NOISES = {"reference": 0.0, "near": 4.0, "far": 16.0}
HELPERS = "tests.helpers.evaluation_metrics"

Luve = Callable[..., Outcome]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return write_methods(tmp_path, COUNT, NOISES)


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: dict[str, Path]) -> Luve:
    """Runs the verb on both methods with two cheap metrics; `more` are further words, keyword arguments options."""

    def run(*more: str, **options: object) -> Outcome:
        given: dict[str, object] = {"output": tmp_path / "out" / "table.csv", "reference": folders["reference"]}
        given |= {"metrics.redness": f"{HELPERS}.Redness", "metrics.redness.log": tmp_path / "log"}
        given |= {"metrics.nearness": f"{HELPERS}.Nearness", "replicates": 50, "device": "cpu"} | options
        words = [f"--{name}={value}" for name, value in given.items()]
        methods = [f"--videos={name}={folders[name]}" for name in ("near", "far")]
        return run_luve(capsys, "evaluate", *methods, *words, *more)

    return run


def totals(outcome: Outcome) -> tuple[int, ...]:
    """Decoded, already there, unreadable."""
    return outcome.numbers(r"  decoded +(\d+) videos?", r"  already there +(\d+)", r"  unreadable +(\d+)")


def measured(tmp_path: Path) -> int:
    """Calls of Redness so far."""
    return len((tmp_path / "log").read_text().splitlines()) if (tmp_path / "log").exists() else 0


def redness(path: Path) -> float:
    return float(read_video(path)[0][..., 0].mean())


def test_every_number_of_the_table(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    assert totals(luve(seed=3)) == (3 * COUNT, 0, 0)
    rows = {row["method"]: row for row in read_csv(tmp_path / "out" / "table.csv")}
    assert list(rows) == ["near", "far"]
    red = {m: [redness(folders[m] / f"video-{n}.mp4") for n in range(COUNT)] for m in rows}
    for method, row in rows.items():
        assert row["n"] == str(COUNT)
        assert row["seed"] == "3"
        assert "torch 2" in row["versions"]
        cells = [float(row[f"redness{end}"]) for end in ("", "_low", "_high")]
        assert cells == pytest.approx(mean_interval(red[method], 3, 50), rel=1e-5)
    assert float(rows["near"]["nearness"]) > float(rows["far"]["nearness"])
    [difference] = [row for row in read_csv(tmp_path / "out" / "table-differences.csv") if row["metric"] == "redness"]
    assert (difference["first"], difference["second"], difference["n"]) == ("far", "near", str(COUNT))
    cells = [float(difference[end]) for end in ("difference", "low", "high")]
    assert cells == pytest.approx(paired_difference(red["far"], red["near"], 3, 50), rel=1e-4, abs=1e-5)
    videos = read_csv(tmp_path / "out" / "table-videos.csv")
    assert len(videos) == 2 * COUNT
    assert float(videos[1]["redness"]) == pytest.approx(red["near"][1], rel=1e-5)
    assert videos[1]["prompt"] == "texture 1"


def test_all_formats_say_the_same(luve: Luve, tmp_path: Path) -> None:
    luve()
    folder = tmp_path / "out"
    rows, content = read_csv(folder / "table.csv"), read_json(folder / "table.json")
    for row in rows:
        numbers = content["methods"][row["method"]]["metrics"]["redness"]
        assert numbers["n"] == COUNT
        for column, key in (("redness", "value"), ("redness_low", "low"), ("redness_high", "high")):
            assert float(row[column]) == pytest.approx(numbers[key], rel=1e-5)
    assert content["metrics"]["nearness"]["higher_is_better"] is True
    markdown = (folder / "table.md").read_text()
    assert "different numbers" not in markdown
    latex = (folder / "table.tex").read_text()
    value = f"{content['methods']['near']['metrics']['redness']['value']:.1f}"
    [line] = [line for line in markdown.splitlines() if line.startswith("| near |")]
    assert line.split(" | ")[1:3][0] == str(COUNT)
    assert line.split(" | ")[2].startswith(f"{value} [")
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")]
    cells = [[cell.strip() for cell in row.split("&")] for row in body.splitlines()[1:]]
    assert [row[0] for row in cells] == ["near", "far"]
    assert all(len(row) == 4 for row in cells)
    assert latex.count(r"\textbf") == 2, "the best of each column"
    assert cells[0][3].startswith(r"\textbf{-")


def test_a_second_run_decodes_nothing_and_writes_the_same(luve: Luve, tmp_path: Path) -> None:
    luve()
    first = (tmp_path / "out" / "table.csv").read_bytes()
    assert totals(luve()) == (0, 2 * COUNT, 0)
    assert measured(tmp_path) == 2 * COUNT
    assert (tmp_path / "out" / "table.csv").read_bytes() == first


def test_only_what_is_new_is_measured(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    luve()
    write_video(folders["far"] / "video-2.mp4", video(2, 30.0), 8, lossless=True)
    # The changed video and its original.
    assert totals(luve()) == (2, 2 * COUNT - 1, 0)
    assert measured(tmp_path) == 2 * COUNT + 1
    # Another argument is another metric; what compares with originals is known.
    assert totals(luve(**{"metrics.redness.gain": 2})) == (2 * COUNT, 0, 0)
    assert measured(tmp_path) == 4 * COUNT + 1
    # Another original is compared with, of one name.
    write_video(folders["reference"] / "video-0.mp4", video(40), 8, lossless=True)
    assert totals(luve()) == (3, 2 * COUNT - 2, 0)
    assert measured(tmp_path) == 4 * COUNT + 1


def test_results_of_another_reading_are_not_used(
    luve: Luve, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirrored video that was measured under the hash of its bytes alone, and one that is refused."""
    set_matrix(folders["near"] / "video-1.mp4", -1, 0, 0, 1)
    with monkeypatch.context() as before:
        before.setattr(clip_hashes, "look", lambda path, matte: clip_hashes.Reading())
        assert totals(luve()) == (3 * COUNT, 0, 0)
    (tmp_path / "out" / "cache" / "clip_readings.jsonl").unlink()
    set_matrix(folders["far"] / "video-2.mp4", 1, 1, -1, 1)
    outcome = luve()
    assert totals(outcome) == (2, 2 * COUNT - 2, 1)  # the mirrored one and its original
    assert "is shown turned or sheared otherwise" in outcome.out


def test_videos_that_cannot_be_read_are_reported(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    broken = folders["near"] / "video-1.mp4"
    broken.write_bytes(broken.read_bytes()[:-300])
    (folders["reference"] / "video-2.mp4").write_text("no video")
    outcome = luve()
    assert totals(outcome)[2] == 2
    content = read_json(tmp_path / "out" / "table.json")
    unreadable = {(item["method"], item["video"]): item["reason"] for item in content["unreadable"]}
    assert unreadable.keys() == {("near", "video-1"), ("reference", "video-2")}
    assert all(reason and reason in outcome.out for reason in unreadable.values())
    unmeasured = {(item["method"], item["video"], item["metric"]) for item in content["not_measured"]}
    assert unmeasured == {(method, "video-2", "nearness") for method in ("near", "far")}
    near, far = read_csv(tmp_path / "out" / "table.csv")
    assert (near["n"], far["n"]) == (str(COUNT - 1), str(COUNT))
    methods = content["methods"]
    assert [methods[m]["metrics"]["nearness"]["n"] for m in ("near", "far")] == [COUNT - 2, COUNT - 1]
    assert [d["n"] for d in content["differences"]] == [COUNT - 1, COUNT - 2]
    assert "video-1" in (tmp_path / "out" / "table.md").read_text()


def test_many_problems_do_not_push_the_table_off_the_terminal(
    luve: Luve, tmp_path: Path, folders: dict[str, Path]
) -> None:
    for number in range(30):
        (folders["near"] / f"empty-{number:02}.mp4").touch()
    outcome = luve()
    unreadable = outcome.out.split("Unreadable:")[1].split("Not measured:")[0]
    assert unreadable.count("is empty (0 bytes)") == 10
    assert "  ... and 20 more, listed in table.md" in unreadable
    assert (tmp_path / "out" / "table.md").read_text().count("is empty (0 bytes)") == 30


def test_names_are_shown_as_they_are(luve: Luve, folders: dict[str, Path]) -> None:
    """Rich takes `:v:` for an emoji."""
    (folders["near"] / "a:v:b [red].mp4").touch()
    assert "near, a:v:b [red]: is empty (0 bytes)" in luve().out


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_measured(
    luve: Luve, tmp_path: Path, folders: dict[str, Path]
) -> None:
    (folders["near"] / os.fsdecode(b"bad\xff.mp4")).touch()
    outcome = luve()
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert line.endswith(r"'bad\udcff.mp4': expected file names in UTF-8; rename it")
    assert not (tmp_path / "out").exists()


def test_what_methods_lack_is_told_and_pairs_are_of_common_videos(
    luve: Luve, tmp_path: Path, folders: dict[str, Path]
) -> None:
    (folders["far"] / "video-3.mp4").unlink()
    (folders["reference"] / "video-4.mp4").unlink()
    outcome = luve()
    assert "far lacks 1 of the others' videos: video-3" in outcome.out
    for text in (outcome.out, (tmp_path / "out" / "table.md").read_text()):
        words = " ".join(text.split())
        assert "The methods have different numbers of readable videos" in words
        assert "Of fewer than 10 videos, intervals are far too narrow" in words
    content = read_json(tmp_path / "out" / "table.json")
    assert content["missing"] == {"far": ["video-3"]}
    assert content["without_original"] == ["video-4"]
    assert "near, video-4, nearness: no original of that name" in outcome.out.split("Not measured:")[1]
    assert content["unreadable"] == [], "a video without an original is read and measured all the same"
    assert [content["methods"][method]["n"] for method in ("near", "far")] == [COUNT, COUNT - 1]
    assert {d["metric"]: d["n"] for d in content["differences"]} == {"redness": COUNT - 1, "nearness": COUNT - 2}


def test_metrics_that_cannot_run_are_listed_and_the_others_run(luve: Luve, tmp_path: Path) -> None:
    outcome = luve(**{"metrics.absent": f"{HELPERS}.Absent", "metrics.fails_later": f"{HELPERS}.FailsLater"})
    assert "\n  absent needs nothing.pt (1 GB): put it into /nowhere" in outcome.out
    assert "\n  fails_later needs more memory" in outcome.out
    content = read_json(tmp_path / "out" / "table.json")
    assert content["not_run"].keys() == {"absent", "fails_later"}
    assert list(content["metrics"]) == ["redness", "nearness"]
    assert "absent" not in read_csv(tmp_path / "out" / "table.csv")[0]
    assert totals(luve(reference="null"))[0] == 0, "what needs no original is known"
    content = read_json(tmp_path / "out" / "table.json")
    assert content["not_run"] == {"nearness": "compares with originals: give their folder, --reference DIR"}


def test_a_video_that_one_metric_refuses(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    write_video(folders["near"] / "video-0.mp4", video(0, 4.0, frames=4), 8, lossless=True)
    content_of = tmp_path / "out" / "table.json"
    outcome = luve(**{"metrics.redness.refuse": 3})
    assert outcome.code == 0
    problems = {(p["metric"], p["video"]): p["reason"] for p in read_json(content_of)["not_measured"]}
    assert problems["redness", "video-0"] == "4 frames, at most 3"
    assert "must be uint8 4 x 32 x 32 x 3" in problems["nearness", "video-0"]
    assert read_json(content_of)["methods"]["near"]["metrics"]["redness"]["n"] == COUNT - 1


def test_a_metric_sees_the_prompt(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    wanted = {"metrics.fitness": f"{HELPERS}.Fitness"}
    videos, report = tmp_path / "out" / "table-videos.csv", tmp_path / "out" / "table.json"

    def excess() -> list[int]:
        rows = [row for row in read_csv(videos) if row["fitness"]]
        return [round(float(row["fitness"]) - float(row["redness"])) for row in rows]

    assert totals(luve(**wanted)) == (3 * COUNT, 0, 0)
    assert excess() == 2 * list(range(COUNT))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("name,prompt\nvideo-0,texture 0\nvideo-1,texture 50\n")
    assert totals(luve(**wanted, prompts=prompts)) == (2, 2 * COUNT - 2, 0), "what has another prompt"
    assert excess() == 2 * [0, 50]
    reasons = [(p["method"], p["video"], p["reason"]) for p in read_json(report)["not_measured"]]
    assert reasons == [(m, f"video-{n}", "no prompt") for m in ("near", "far") for n in range(2, COUNT)]
    for file in (path for folder in folders.values() for path in folder.glob("*.json")):
        file.unlink()
    luve(**wanted)
    reason = "needs prompts: --prompts FILE, or a JSON file beside each video"
    assert read_json(report)["not_run"] == {"fitness": reason}


def frechet(**options: object) -> dict[str, object]:
    name = "metrics.fd"
    return {
        name: "luve_lightning.metrics.FrechetPatchDistance",
        f"{name}.extractor": f"{HELPERS}.Means",
        f"{name}.patches": "{size: 16, frames: 2}",
        "frechet_replicates": 30,
    } | options


def test_distances_of_sets(luve: Luve, tmp_path: Path, folders: dict[str, Path]) -> None:
    outcome = luve(**frechet())
    assert outcome.code == 0, outcome.err
    near, far = read_csv(tmp_path / "out" / "table.csv")

    def gaussian(method: str) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for n in range(COUNT):
            frames = read_video(folders[method] / f"video-{n}.mp4")[0].astype(float)
            for t in (0, 2):  # the middles of two parts of three frames
                rows += [frames[t, y : y + 16, x : x + 16].mean((0, 1)) for y in (0, 16) for x in (0, 16)]
        return np.mean(rows, axis=0), np.cov(np.array(rows).T)

    def distance(method: str) -> float:
        from scipy.linalg import sqrtm

        (m1, c1), (m2, c2) = gaussian(method), gaussian("reference")
        return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real))

    assert float(near["fd_patch_means"]) == pytest.approx(distance("near"), rel=1e-3)
    assert float(far["fd_patch_means"]) == pytest.approx(distance("far"), rel=1e-3)
    assert float(far["fd_patch_means_low"]) <= float(far["fd_patch_means"]) <= float(far["fd_patch_means_high"])
    assert far["extractor"] == "fd_patch_means: means-1"
    # Without originals the method's own reference is needed.
    content = tmp_path / "out" / "table.json"
    luve(**frechet(reference="null"))
    assert read_json(content)["not_run"]["fd_patch_means"].startswith("has no reference")
    given = frechet(**{"reference": "null", "metrics.fd.reference": folders["reference"]})
    assert totals(luve(**given))[0] == 0, "features of the videos are known"
    again = read_json(content)["methods"]["far"]["metrics"]["fd_patch_means"]["value"]
    assert again == pytest.approx(distance("far"), rel=1e-3)


def test_identical_videos_are_infinitely_good_in_every_format(
    luve: Luve, tmp_path: Path, folders: dict[str, Path]
) -> None:
    outcome = luve(f"--videos=copy={folders['reference']}", **{"metrics.psnr_rgb": "luve_lightning.metrics.PsnrRgb"})
    assert outcome.code == 0, outcome.err
    row = read_csv(tmp_path / "out" / "table.csv")[2]
    assert row["psnr_rgb"] == "inf"
    assert math.isinf(float(row["psnr_rgb_low"]))
    assert read_json(tmp_path / "out" / "table.json")["methods"]["copy"]["metrics"]["psnr_rgb"]["value"] == "inf"


def test_the_average_of_vbench_needs_all_five(luve: Luve, tmp_path: Path) -> None:
    outcome = luve(**{"metrics.tf": "luve_lightning.metrics.TemporalFlickering"})
    assert outcome.code == 0, outcome.err
    reason = read_json(tmp_path / "out" / "table.json")["not_run"]["vbench_average"]
    assert reason.startswith("needs all five dimensions, missing: subject_consistency, background_consistency")


@pytest.mark.parametrize(
    ("compare", "pairs"),
    [("all", [("far", "near")]), ("none", []), ("near,far", [("near", "far")]), ("near, far;far,near", 2)],
)
def test_pairs(luve: Luve, tmp_path: Path, compare: str, pairs: object) -> None:
    assert luve(compare=compare).code == 0
    found = [
        (d["first"], d["second"])
        for d in read_json(tmp_path / "out" / "table.json")["differences"]
        if d["metric"] == "redness"
    ]
    assert found == pairs or len(found) == pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), {"compare": "near,other"}, "compare: expected all, none or pairs such as A,B of near, far"),
        ((), {"output": "table.txt"}, "output: expected a file that ends in .csv"),
        ((), {"device": "cuda:99"}, "device: no cuda:99 here"),
        ((), {"replicates": 0}, "replicates >= 1"),
        ((), {"num_workers": 0}, "expected num_workers >= 1"),
        ((), {"metrics.other": "torchmetrics.MeanMetric"}, "metrics.other: MeanMetric is no metric of videos"),
        ((), {"metrics.again": f"{HELPERS}.Redness"}, "metrics.redness and metrics.again are both redness"),
        (("--videos", "folder"), {}, "--videos: expected NAME=VALUE"),
        (("--videos", "a.b=folder"), {}, "no dot in the name"),
        (("--videos", "gone=nothing/here"), {}, "videos.gone: nothing/here: no such folder of videos"),
        (("--video", "a=b"), {}, "video: unknown key; did you mean 'videos'?"),
    ],
)
def test_mistakes_are_one_line(luve: Luve, words: tuple[str, ...], options: dict[str, object], message: str) -> None:
    outcome = luve(*words, **options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1


def test_no_metric_is_a_mistake(capsys: pytest.CaptureFixture[str], folders: dict[str, Path]) -> None:
    outcome = run_luve(capsys, "evaluate", f"--videos=near={folders['near']}", "--metrics={}", "--output=table.csv")
    assert outcome.error_lines == ["luve evaluate: error: metrics: expected at least one, by name"]


def test_nothing_readable_is_an_error_that_names_the_files(luve: Luve, folders: dict[str, Path]) -> None:
    for method in ("near", "far"):
        for path in folders[method].glob("*.mp4"):
            path.write_text("no video")
    outcome = luve()
    assert outcome.code == 2
    assert "none of the videos of near, far can be read" in outcome.err
    assert outcome.out.count("near, video-") == COUNT
