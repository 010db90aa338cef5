"""What is on a report's page, and what is said of what is not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from luve_lightning.ablations.results import COLUMNS
from luve_lightning.cli.report import read_result_table
from luve_lightning.data.video_files import read_video, write_video
from luve_lightning.reporting.page import Unreadable
from luve_lightning.reporting.plots import read_curves, read_spectra
from luve_lightning.reporting.report import MIB, PageText, ReportInputs, ReportPage, build_report
from luve_lightning.reporting.videos import Comparison, read_comparison, read_sample
from tests.helpers.report_inputs import WORLD, write_results, write_run, write_spectra, write_videos
from tests.helpers.run_luve import run_luve

TEXT = PageText("A report", "a note", {"date": "2026-11-22", "command": "luve report"})


def build(limit_mib: float = 20.0, **inputs: object) -> ReportPage:
    return build_report(ReportInputs(**inputs), TEXT, read_result_table, limit_mib)  # type: ignore[arg-type]


def test_a_table_says_on_what_it_was_measured_and_keeps_the_papers_numbers_apart(tmp_path: Path) -> None:
    page = build(results={"experts": write_results(tmp_path)}).html
    assert WORLD.replace("'", "&#39;") in page
    assert "The paper&#39;s own, not measured here" in page or "The paper's own, not measured here" in page
    for row in re.findall(r"<tr>\s*<th scope=\"row\".*?</tr>", page, re.DOTALL):
        cells = re.findall(r"<td([^>]*)>(.*?)</td>", row, re.DOTALL)
        for attributes, text in cells:
            if re.search(r"47\.8|51\.75|41\.03", text):
                assert 'class="paper"' in attributes
            if re.search(r"10\.50|19\.50|28\.50|10\.00 to 11\.50", text):
                assert "paper" not in attributes
    assert "a&lt;b&gt; &amp; title" in page
    assert "<b>" not in page
    assert "Directions of the differences that the paper has too: 1 same, 1 not told apart." in page


def test_the_papers_digits_are_the_files(tmp_path: Path) -> None:
    table = read_result_table("experts", write_results(tmp_path))
    assert [line.paper for line in table.metrics[0].lines] == ["47.8", "51.75", "41.03"]
    assert table.metrics[0].reference == "full & title"
    assert (table.title, table.metrics[0].lines[0].note) == ("The experts", "a note on bare")
    assert table.notes == ("Not measured: fid: no network here", "Failed: odd: 1 out of memory")
    assert table.provenance is not None
    assert table.provenance.facts["settings"] == "steps 20"
    assert table.provenance.stages == (("without_selection", "0", "lfe", "c0ffeec0ffee", "1.5"),)  # the hash is cut
    assert [metric.has_paper for metric in table.metrics] == [True, False]
    assert table.directions() == {"same": 1, "none": 1}


def test_without_provenance_the_page_says_so(tmp_path: Path) -> None:
    made = build(results={"experts": write_results(tmp_path, None)})
    assert "No file says what this table was measured on" in made.html
    assert "nothing says where its numbers come from" in str(made.left_out[0])


def test_what_is_missing_or_unreadable_is_listed_and_the_rest_is_shown(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results")
    (tmp_path / "short.csv").write_text("table,row\nexperts,full\n")
    (tmp_path / "no.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    made = build(
        results={"experts": results, "short": tmp_path / "short.csv", "gone": tmp_path / "gone.csv", "off": None},
        curves={"empty": tmp_path / "empty"},
        spectra={"short": tmp_path / "short.csv"},
        comparisons={"pair": Comparison(tmp_path / "no.mp4", tmp_path / "no2.mp4"), "off": None},
        videos={"no": tmp_path / "no.mp4", "empty": tmp_path / "empty"},
    )
    told = {line.key: line.reason for line in made.left_out}
    assert made.counts == {"tables": 1, "curves": 0, "dashboards": 0, "spectra": 0, "comparisons": 0, "videos": 0}
    assert told["results.gone"] == "missing"
    assert told["results.short"].startswith("no table of results: the columns title, metric, unit")
    assert told["curves.empty"] == "no metrics.csv there: missing, or the run logged elsewhere"
    assert told["spectra.short"].startswith("no table of spectra")
    assert told["comparisons.pair"] == f"b: {tmp_path / 'no2.mp4'} is missing"
    assert "Invalid data" in told["videos.no"]
    assert told["videos.empty"] == "missing: no videos in this folder"
    for key, reason in told.items():
        assert f"<strong>{key}</strong>" in made.html
        assert "\n" not in reason


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("mean", "x", "row bare, metric fd_patch: mean: expected a number, got 'x'"),
        ("direction", "up", "direction: expected one of 'same', 'opposite', 'none', '', got 'up'"),
        ("better", "", None),
    ],
)
def test_values_of_a_table_are_checked(tmp_path: Path, column: str, value: str, message: str | None) -> None:
    path = write_results(tmp_path)
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    cells[COLUMNS.index(column)] = value
    path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    if message is None:
        assert read_result_table("experts", path).metrics[0].better == value
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        read_result_table("experts", path)


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    """Steps after the checkpoint that it resumed from count as logged by the later part."""
    found = read_curves("run", write_run(tmp_path / "run"), ["*loss*"])
    (line,) = found.chart.series
    assert line.name == "train/loss"
    assert (line.y[0], line.y[-1]) == (1.0, pytest.approx(1 + 1 / 700))
    assert line.y.min() == pytest.approx(1 / 500), "step 499 is the last of the first part"
    assert found.provenance is not None
    assert found.provenance.facts["revision"] == "beef"
    both = read_curves("run", tmp_path / "run", ["*loss*", "val/*"])
    assert [series.name for series in both.chart.series] == ["train/loss", "val/psnr"]
    with pytest.raises(Unreadable, match=r"no column like x\*"):
        read_curves("run", tmp_path / "run", ["x*"])


def test_spectra_have_a_line_a_band_and_both_switches(tmp_path: Path) -> None:
    plots = read_spectra("mini", write_spectra(tmp_path / "spectra"))
    assert [line.name for line in plots.resolved.series] == ["0-0.5 of Nyquist", "0.5-1 of Nyquist"]
    assert [mark.name for mark in plots.resolved.marks] == [
        "sigma_switch suggested here: 0.750", "of the released checkpoints: 0.875"
    ]  # fmt: skip
    # 0.75 lies half way between 0.9 (step 1) and 0.6 (step 2) of three.
    assert plots.resolved.marks[0].x == pytest.approx(1.5)
    assert plots.sentence.startswith("Measured on 2 videos, backbone data/mini/wan")
    alone = read_spectra("mini", tmp_path / "spectra" / "spectra.csv")
    assert alone.sentence == plots.sentence


def test_frames_are_kept_bit_by_bit(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    dark, light = write_videos(tmp_path)
    found = read_comparison("rooms", Comparison(dark, light, frames=[3]))
    assert found.labels == ("dark", "light")
    assert found.size == (32, 32)
    picture = Image.open(io.BytesIO(base64.b64decode(found.pairs[0].a.split(",")[1])))
    assert np.array_equal(np.asarray(picture.convert("RGB")), read_video(dark)[0][3])
    assert "16x16 against 32x32 pixels, the smaller enlarged without smoothing, lossless" in found.note
    with pytest.raises(Unreadable, match="expected numbers from 0 to 23"):
        read_comparison("rooms", Comparison(dark, light, frames=[24]))
    write_video(tmp_path / "wide.mp4", np.zeros((2, 16, 32, 3), np.uint8), 8)
    with pytest.raises(Unreadable, match="16x16 and of 16x32 have different shapes"):
        read_comparison("rooms", Comparison(dark, tmp_path / "wide.mp4"))


def test_a_video_that_browsers_play_is_the_file_itself(tmp_path: Path) -> None:
    import base64

    dark, light = write_videos(tmp_path)
    kept, encoded = read_sample("light", light), read_sample("dark", dark)
    assert base64.b64decode(kept.address.split(",")[1]) == light.read_bytes()
    assert "as it is" in kept.note
    assert "encoded again" in encoded.note
    (tmp_path / "again.mp4").write_bytes(base64.b64decode(encoded.address.split(",")[1]))
    frames = read_video(tmp_path / "again.mp4")[0]
    assert np.abs(frames.astype(int) - read_video(dark)[0]).mean() < 12
    assert kept.prompt == "a light <room>"


@pytest.mark.slow
def test_the_page_keeps_within_its_limit(tmp_path: Path) -> None:
    dark, light = write_videos(tmp_path / "videos")
    inputs: dict[str, object] = {
        "results": {"experts": write_results(tmp_path)},
        "comparisons": {"rooms": Comparison(dark, light)},
        "videos": {"light": light, "dark": dark},
    }
    whole = build(**inputs)
    size = len(whole.html.encode()) / MIB
    assert whole.counts["videos"] == 2
    for share in (0.45, 0.7, 0.97):
        made = build(size * share, **inputs)
        assert len(made.html.encode()) <= size * share * MIB
        assert made.counts["tables"] == 1
        assert made.counts["comparisons"] + made.counts["videos"] < 3
        assert all("too large" in line.reason for line in made.left_out)
        assert len(made.left_out) == 3 - made.counts["comparisons"] - made.counts["videos"]
    with pytest.raises(ValueError, match=r"limit_mib: 0.001: the tables and charts alone are 0\.\d+ MiB"):
        build(0.001, **inputs)


def test_nothing_on_the_page_points_outside(tmp_path: Path) -> None:
    dark, light = write_videos(tmp_path / "videos")
    page = build(
        results={"experts": write_results(tmp_path)},
        curves={"run": write_run(tmp_path / "run")},
        comparisons={"rooms": Comparison(dark, light)},
        videos={"light": light},
    ).html
    addresses = re.findall(r'(?:src|href|action|poster|data)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert "style=" not in page, "the page's policy would not let it work"


def test_the_command_prints_what_it_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = write_results(tmp_path)
    output = tmp_path / "new" / "report.html"
    outcome = run_luve(capsys, "report", f"--results=experts={results}", f"--curves=lfe={tmp_path / 'no'}",
                       f"--output={output}", "--title=Mine & yours")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert f"{output}: tables 1, curves 0, dashboards 0, spectra 0, comparisons 0, videos 0;" in outcome.out
    assert f"left out: curves.lfe: {tmp_path / 'no'}: missing" in outcome.out
    assert "<title>Mine &amp; yours</title>" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    again = run_luve(capsys, "report", f"--curves=lfe={tmp_path / 'no'}", f"--output={output}")
    assert again.code == 0
    assert "Nothing to show" in output.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output=HERE/report.csv"], "output: expected a file that ends in .html, got HERE/report.csv"),
        (["--output=HERE/r.html", "--limit_mib=0", "--curves=a=HERE/no"], "limit_mib: expected a number > 0, got 0"),
        (["--output=HERE/r.html", "--results=experts"], "--results: expected NAME=VALUE"),
        (["--output=HERE/r.html"], "nothing to show: give results, curves, dashboards, spectra, comparisons or videos"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = run_luve(capsys, "report", *(option.replace("HERE", str(tmp_path)) for option in options))
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message.replace("HERE", str(tmp_path)) in line
    assert not list(tmp_path.iterdir())
