"""Scores of clips: what is kept by them, and which scores are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.clip_scores import ClipScores, ScoreRow, ScoresError, ScoreSettings, read_rows, write_rows
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_index import CAPTIONS, ClipEntry
from luve_lightning.files import text_digest

SETTINGS = ScoreSettings("hpsv3", "1.0.0, weights 0123", "Style", "4 frames equally spaced")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips; the scores do not care whether their bytes are a video."""
    folder = tmp_path_factory.mktemp("clips")
    for name in "abcd":
        (folder / f"{name}.mp4").write_bytes(name.encode())
    return folder


@pytest.fixture(scope="module")
def entries(folder: Path) -> list[ClipEntry]:
    captions = dict.fromkeys(CAPTIONS, "a text")
    return [ClipEntry(name, folder / f"{name}.mp4", "url", 16, 9, 48, 48, captions) for name in "abcd"]


def rows_of(entries: list[ClipEntry], scores: list[float | None]) -> list[ScoreRow]:
    hashes = ClipHashes(entries[0].path.parent)
    return [
        ScoreRow(
            clip_id=entry.clip_id,
            clip_sha256=hashes.digest(entry.path),
            caption_sha256=text_digest(entry.captions["Style"]),
            settings=SETTINGS,
            frame_indices=(1, 3) if score is not None else (),
            frame_scores=(score, score) if score is not None else (),
            score=score,
            error=None if score is not None else "is empty (0 bytes)",
        )
        for entry, score in zip(entries, scores, strict=True)
    ]


def written(folder: Path, *parts: list[ScoreRow]) -> ClipScores:
    for number, rows in enumerate(parts):
        write_rows(folder / f"part-{number}.parquet", rows)
    return ClipScores.read(folder)


def names(entries: list[ClipEntry]) -> str:
    return "".join(entry.clip_id for entry in entries)


def test_rows_survive_the_file(entries: list[ClipEntry], tmp_path: Path) -> None:
    rows = rows_of(entries, [6.1, 0.1 + 0.2, None, -3.0])
    write_rows(tmp_path / "part-0.parquet", rows)
    assert read_rows(tmp_path) == rows == read_rows(tmp_path / "part-0.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["part-0.parquet"]


def test_it_keeps_what_is_above_the_threshold_and_says_how_many(entries: list[ClipEntry], tmp_path: Path) -> None:
    scores = written(tmp_path, rows_of(entries[:2], [6.6, 6.5]), rows_of(entries[2:], [None, 7.0]))
    kept, summary = scores.keep(entries, 6.5, "hpsv3")
    assert names(kept) == "ad", "6.5 is not above 6.5"
    assert summary == "2 of 4 clips are above 6.5 by hpsv3 (1.0.0, weights 0123), 1 unreadable"
    assert names(scores.keep(entries[1::2], 6.5, "hpsv3")[0]) == "d", "a part of the clips, in their order"
    assert len(scores) == 4


@given(values=st.lists(st.floats(0, 10), min_size=4, max_size=4), threshold=st.floats(0, 10))
def test_any_scores_and_threshold(entries: list[ClipEntry], values: list[float], threshold: float) -> None:
    scores = ClipScores(entries[0].path.parent, rows_of(entries, list(values)), SETTINGS)
    expected = [entry for entry, value in zip(entries, values, strict=True) if value > threshold]
    if expected:
        assert scores.keep(entries, threshold, "hpsv3")[0] == expected
    else:
        with pytest.raises(ScoresError, match="none of 4 clips is above"):
            scores.keep(entries, threshold, "hpsv3")


def test_nothing_left_is_an_error_that_names_the_highest(entries: list[ClipEntry], tmp_path: Path) -> None:
    scores = written(tmp_path, rows_of(entries, [1.0, 2.5, None, 2.0]))
    message = "none of 4 clips is above 6.5 by hpsv3, 1 unreadable; the highest has 2.5"
    with pytest.raises(ScoresError, match=message):
        scores.keep(entries, 6.5, "hpsv3")


def test_another_scorer_is_refused(entries: list[ClipEntry], tmp_path: Path) -> None:
    scores = written(tmp_path, rows_of(entries, [7.0] * 4))
    with pytest.raises(ScoresError) as error:
        scores.keep(entries, 0.65, "sharpness-exposure")
    assert str(error.value) == (f"{tmp_path}: scores by 'hpsv3', but the threshold 0.65 is for 'sharpness-exposure'")


def test_clips_without_a_score_are_named(entries: list[ClipEntry], tmp_path: Path) -> None:
    scores = written(tmp_path, rows_of(entries[:2], [7.0, 7.0]))
    with pytest.raises(ScoresError, match=r"2 of 4 differ: c has no score; d has no score \(`luve score`"):
        scores.keep(entries, 6.5, "hpsv3")


def test_clips_with_other_bytes_or_another_caption_are_named(
    entries: list[ClipEntry], folder: Path, tmp_path: Path
) -> None:
    other = replace(entries[0], path=tmp_path / "a.mp4")
    other.path.write_bytes(b"cut again")
    reworded = replace(entries[1], captions={**entries[1].captions, "Style": "another text"})
    elsewhere = replace(entries[2], captions={**entries[2].captions, "Background": "not what was scored"})
    scores = written(tmp_path, rows_of(entries, [7.0] * 4))
    with pytest.raises(ScoresError, match=r"2 of 4 differ: a has other bytes; b has another Style \("):
        scores.keep([other, reworded, elsewhere, entries[3]], 6.5, "hpsv3")
    assert names(scores.keep([elsewhere, entries[3]], 6.5, "hpsv3")[0]) == "cd"


def test_a_message_names_three_and_stays_one_line(entries: list[ClipEntry], tmp_path: Path) -> None:
    unknown = [replace(entry, clip_id=f"{entry.clip_id}-{i}") for i in range(100) for entry in entries]
    with pytest.raises(ScoresError) as error:
        written(tmp_path, rows_of(entries, [7.0] * 4)).keep(unknown, 6.5, "hpsv3")
    assert "400 of 400 differ: a-0 has no score; b-0 has no score; c-0 has no score ..." in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_scored_twice_counts_by_its_present_bytes(entries: list[ClipEntry], tmp_path: Path) -> None:
    new = rows_of(entries, [7.0, 7.0, 1.0, 1.0])
    stale = [replace(row, clip_sha256="0" * 64, score=9.0) for row in new]
    for number, parts in enumerate([(stale, new), (new, stale)]):
        kept, _ = written(tmp_path / str(number), *parts).keep(entries, 6.5, "hpsv3")
        assert names(kept) == "ab"


def test_a_later_success_outdoes_an_earlier_failure(entries: list[ClipEntry], tmp_path: Path) -> None:
    failed, good = rows_of(entries, [None] * 4), rows_of(entries, [7.0] * 4)
    for number, parts in enumerate([(failed, good), (good, failed)]):
        assert len(written(tmp_path / str(number), *parts).keep(entries, 6.5, "hpsv3")[0]) == 4


def test_scores_of_two_kinds_are_refused(entries: list[ClipEntry], tmp_path: Path) -> None:
    first, second = rows_of(entries[:2], [7.0, 7.0]), rows_of(entries[2:], [7.0, 7.0])
    other = [replace(row, settings=replace(SETTINGS, scorer_version="1.0.0, weights 4567")) for row in second]
    with pytest.raises(ScoresError, match=r"scores of different settings: .*weights 0123.* and .*weights 4567"):
        written(tmp_path, first, other)


def test_what_is_no_file_of_scores_is_said_in_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(FileNotFoundError, match="no scores; `luve score` makes them"):
        ClipScores.read(tmp_path / "nothing")
    with pytest.raises(ScoresError, match="holds no scores"):
        ClipScores.read(tmp_path)
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1 but cut short")
    with pytest.raises(ScoresError, match=r"part-0.parquet: no Parquet file of scores \([^\n]+\)$"):
        ClipScores.read(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ScoresError, match=r"other.parquet: no Parquet file of scores \([^\n]+\)$"):
        ClipScores.read(tmp_path / "other.parquet")
