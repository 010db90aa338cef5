"""`luve evaluate` with measures that compare a video with its first stage's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from luve_lightning.callbacks.sample_metrics import SampleMeter
from luve_lightning.data.video_files import write_video
from luve_lightning.metrics import ContentCompleted, ContentKept
from tests.helpers.evaluation import read_csv, read_json
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.scenes import enlarged, photograph, resized

NAMES = ("astronaut", "cat")
METRICS = {"content_kept": ContentKept(), "content_completed": ContentCompleted()}

Luve = Callable[..., Outcome]


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Luve:
    """Runs the verb on the folders `own`, whose videos say that they have a motion stage, and `other`, with nothing."""
    for name in NAMES:
        true = photograph(name, 64, frames=2)
        motion = resized(true, 32)
        for folder, frames in (
            ("own", true),
            ("own/motion", motion),
            ("other", enlarged(motion, 64)),
            ("motions", motion),
        ):
            write_video(tmp_path / folder / f"{name}.mp4", frames.contiguous().numpy(), 8, lossless=True)
        record = {"prompt": name, "stages": [{"stage": "motion", "height": 32, "width": 32}, {"stage": "refined"}]}
        (tmp_path / "own" / f"{name}.json").write_text(json.dumps(record))

    def run(*more: str) -> Outcome:
        words = [f"--videos={name}={tmp_path / name}" for name in ("own", "other")]
        words += [f"--metrics.{name}=luve_lightning.metrics.{type(m).__name__}" for name, m in METRICS.items()]
        words += [f"--output={tmp_path / 'out' / 'table.csv'}", "--replicates=20", "--device=cpu"]
        return run_luve(capsys, "evaluate", *words, *more)

    return run


def values(tmp_path: Path) -> dict[str, dict[str, float]]:
    rows = read_csv(tmp_path / "out" / "table.csv")
    return {row["method"]: {name: float(row[name]) for name in METRICS if row[name]} for row in rows}


def test_videos_are_compared_with_what_was_kept_or_given(luve: Luve, tmp_path: Path) -> None:
    outcome = luve(f"--motion={tmp_path / 'motions'}")
    assert outcome.code == 0, outcome.err
    found = values(tmp_path)
    for name, metric in METRICS.items():
        each = []
        for scene in NAMES:
            true = photograph(scene, 64, frames=2)
            each.append((true, resized(true, 32)))
        assert found["own"][name] == pytest.approx(sum(metric.score(*pair) for pair in each) / 2, rel=1e-4)
    assert found["own"]["content_completed"] > 2 * found["other"]["content_completed"]
    assert found["other"]["content_kept"] > 0.98
    again = luve(f"--motion={tmp_path / 'motions'}")
    assert "decoded        0 videos" in again.out
    # Another first stage is another result, that of its video alone.
    changed = tmp_path / "own" / "motion" / "cat.mp4"
    write_video(changed, resized(photograph("rocket", frames=2), 32).contiguous().numpy(), 8, lossless=True)
    assert "decoded        1 video" in luve(f"--motion={tmp_path / 'motions'}").out
    assert values(tmp_path)["own"]["content_kept"] < 0.7


def test_a_video_without_its_first_stage_is_named(luve: Luve, tmp_path: Path) -> None:
    (tmp_path / "own" / "motion" / "cat.mp4").write_bytes(b"nothing")
    outcome = luve()
    assert outcome.code == 0, outcome.err
    assert values(tmp_path)["other"] == {}
    problems = read_json(tmp_path / "out" / "table.json")["not_measured"]
    reasons = {(problem["method"], problem["video"]): problem["reason"] for problem in problems}
    assert reasons.keys() == {("own", "cat"), ("other", "cat"), ("other", "astronaut")}
    assert reasons["other", "cat"] == "no motion video"
    # What the videos do not say to be a stage of theirs is none.
    for name in NAMES:
        (tmp_path / "own" / f"{name}.json").write_text('{"stages": [{"stage": "direct"}]}')
    outcome = luve("--metrics.red=tests.helpers.evaluation_metrics.Redness")
    assert "content_kept: needs motion videos: generate with --keep_stages true, or give --motion DIR" in outcome.out


def test_an_enlarged_video_is_compared_with_what_was_enlarged(luve: Luve, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "other" / f"{name}.json").write_text(json.dumps({"enlarged_from": f"../motions/{name}.mp4"}))
    assert luve().code == 0
    assert values(tmp_path)["other"]["content_kept"] > 0.98


def test_motion_videos_of_other_names_are_refused(luve: Luve, tmp_path: Path) -> None:
    (tmp_path / "motions" / "cat.mp4").rename(tmp_path / "motions" / "dog.mp4")
    (tmp_path / "motions" / "astronaut.mp4").unlink()
    outcome = luve(f"--motion={tmp_path / 'motions'}")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "motions has the name of a video of own, other" in outcome.err
    outcome = luve(f"--motion={tmp_path / 'nowhere'}")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


def test_training_has_no_motion_videos() -> None:
    with pytest.raises(
        ValueError, match=r"^metrics: content_kept needs each video's motion video: measure it with luv"
    ):
        SampleMeter({"content_kept": ContentKept()}, has_reference=True)
