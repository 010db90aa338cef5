"""Questions for a judge: what it sees, what it must not see, and what cannot be asked."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from luve_lightning.data.video_files import write_video
from luve_lightning.evaluation.video_sets import VideoSets, find_video_sets
from luve_lightning.reporting.judge import AXES, KeyEntry, QuestionOptions, assign_ids, read_key, write_questions

METHODS, NAMES = ("luve", "upscaled wan"), ("boat", "birds", "water")


def frames(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> VideoSets:
    """Two methods, three lossless videos each; prompts beside the first method's."""
    folder = tmp_path_factory.mktemp("videos")
    for m, method in enumerate(METHODS):
        for n, name in enumerate(NAMES):
            write_video(folder / method / f"{name}.mp4", frames(10 * m + n), 16, lossless=True)
            (folder / METHODS[0] / f"{name}.json").write_text(json.dumps({"prompt": f"“{name}” {{moves}}"}))
    return find_video_sets({method: folder / method for method in METHODS})


def read_questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_question_shows_the_videos_own_frames(sets: VideoSets, tmp_path: Path) -> None:
    done = []
    key = write_questions(sets, tmp_path, QuestionOptions(frames=3), lambda: done.append(1))
    questions = read_questions(tmp_path)
    assert len(questions) == len(done) == 6
    assert read_key(tmp_path) == key
    for question in questions:
        entry = key.entries[question["id"]]
        seed = 10 * METHODS.index(entry.method) + NAMES.index(entry.video)
        assert question["prompt"] == entry.prompt == f"“{entry.video}” {{moves}}"
        assert question["frame_indices"] == [0, 2, 4]
        assert question["frame_size"] == question["video_size"] == [32, 48]
        for path, index in zip(question["frames"], (0, 2, 4), strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / path)), frames(seed)[index])
        text = question["question"]
        assert all(word in text for word in (entry.prompt, question["id"], "3 frames", "from 1 (worst) to 10"))
        assert all(f"- {axis}: {meaning}" in text for axis, meaning in AXES.items())


def test_the_judge_cannot_tell_the_methods(sets: VideoSets, tmp_path: Path) -> None:
    key = write_questions(sets, tmp_path, QuestionOptions(seed=4))
    shown = (tmp_path / "questions.jsonl").read_text()
    assert not any(word in shown for word in (*METHODS, ".mp4", str(tmp_path)))
    assert not [path for path in (tmp_path / "frames").iterdir() if path.name.split("-")[0] not in key.entries]
    order = [key.entries[question["id"]].method for question in read_questions(tmp_path)]
    assert order != sorted(order)
    again = assign_ids(sets, blind=True, seed=4)
    assert {i: (e.method, e.video) for i, e in key.entries.items()} == again
    other = assign_ids(sets, blind=True, seed=5)
    assert not again.keys() & other.keys()
    assert sorted(other.values()) == sorted(again.values())


def test_open_questions_name_the_method(sets: VideoSets, tmp_path: Path) -> None:
    write_questions(sets, tmp_path, QuestionOptions(blind=False))
    ids = [question["id"] for question in read_questions(tmp_path)]
    assert ids == [f"{method}/{name}" for method in METHODS for name in sorted(NAMES)]
    assert (tmp_path / "frames" / "upscaled wan" / "boat" / "0.png").is_file()


def test_frames_may_be_embedded_and_reduced(sets: VideoSets, tmp_path: Path) -> None:
    write_questions(sets, tmp_path, QuestionOptions(frames=9, max_side=24, embed=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "questions.jsonl"]
    for question in read_questions(tmp_path):
        assert question["frame_indices"] == [0, 1, 2, 3, 4]
        assert (question["frame_size"], question["video_size"]) == ([16, 24], [32, 48])
        for url in question["frames"]:
            kind, data = url.split(",")
            assert kind == "data:image/png;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (24, 16)


def test_unreadable_videos_are_told_and_can_be_mended(tmp_path: Path) -> None:
    videos, folder = tmp_path / "videos", tmp_path / "out"
    for name in NAMES:
        write_video(videos / f"{name}.mp4", frames(0), 16, lossless=True)
    whole = (videos / "birds.mp4").read_bytes()
    (videos / "birds.mp4").write_bytes(b"no video")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("name,prompt\n" + "".join(f"{name},it moves\n" for name in NAMES))
    found = find_video_sets({"a": videos}, prompts=prompts)
    key = write_questions(found, folder, QuestionOptions(frames=1))
    assert list(key.unreadable) == ["a/birds"]
    assert "birds.mp4" in key.unreadable["a/birds"]
    assert {entry.video for entry in key.entries.values()} == {"boat", "water"}
    assert len(read_questions(folder)) == 2
    (videos / "birds.mp4").write_bytes(whole)
    mended = write_questions(found, folder, QuestionOptions(frames=1))
    assert mended.unreadable == {}
    assert key.entries.items() < mended.entries.items()
    for name in NAMES:
        (videos / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"none of the videos can be read: \S+mp4"):
        write_questions(found, tmp_path / "none", QuestionOptions())
    assert not (tmp_path / "none" / "key.json").exists()


def test_bad_input_is_one_line(sets: VideoSets, tmp_path: Path) -> None:
    write_questions(sets, tmp_path, QuestionOptions(frames=1))
    kept = (tmp_path / "questions.jsonl").read_bytes(), (tmp_path / "key.json").read_bytes()
    with pytest.raises(ValueError, match=r"output: .* has the questions of other videos, prompts or seed"):
        write_questions(sets, tmp_path, QuestionOptions(frames=1, seed=1))
    assert kept == ((tmp_path / "questions.jsonl").read_bytes(), (tmp_path / "key.json").read_bytes())
    few = VideoSets(sets.methods, {}, {"boat": "a boat"})
    with pytest.raises(ValueError, match=r"prompts: 2 videos have none, .* judged: birds, water$"):
        write_questions(few, tmp_path / "new", QuestionOptions())
    for changes in ({"frames": 0}, {"max_side": 0}):
        with pytest.raises(ValueError, match="expected frames >= 1 and max_side >= 1"):
            QuestionOptions(**changes)
    with pytest.raises(FileNotFoundError, match=r"key.json: no such file; `luve judge --videos"):
        read_key(tmp_path / "new")
    for text in ("[]", "{", '{"entries": {"a": 1}, "unreadable": {}}', '{"entries": {"a": {"x": 1}}}'):
        (tmp_path / "key.json").write_text(text)
        with pytest.raises(ValueError, match="not a key that `luve judge` wrote"):
            read_key(tmp_path)


def test_a_key_says_what_was_asked(sets: VideoSets, tmp_path: Path) -> None:
    write_questions(sets, tmp_path, QuestionOptions(blind=False, frames=1))
    assert read_key(tmp_path).entries["luve/boat"] == KeyEntry("luve", "boat", "“boat” {moves}")
