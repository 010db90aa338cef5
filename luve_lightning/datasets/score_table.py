"""Scores of clips as Parquet: one row a clip, one file for each process that scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luve_lightning.files import replacing

PATTERN = "part-*.parquet"


class ScoresError(ValueError):
    """Scores that are missing, damaged, or not those asked for; the message is one line."""


@dataclass(frozen=True)
class ScoreSettings:
    """What a set of scores has in common; scores of different settings are never mixed.

    Attributes:
        scorer: `Scorer.name`.
        scorer_version: `Scorer.version`.
        caption_column: the caption that frames were scored against, a name of `CAPTIONS`.
        frame_choice: which frames of a clip were scored, in words.
    """

    scorer: str
    scorer_version: str
    caption_column: str
    frame_choice: str

    def __str__(self) -> str:
        return f"{self.scorer} ({self.scorer_version}; {self.frame_choice}; {self.caption_column})"


@dataclass(frozen=True)
class ScoreRow:
    """The score of one clip, or why it has none.

    Attributes:
        clip_id: the clip.
        clip_sha256: `ClipHashes.digest`, 64 hex digits; empty when it could not be read.
        caption_sha256: of the caption as UTF-8.
        settings: how it was scored.
        frame_indices: frames scored, counted from 0.
        frame_scores: their scores.
        score: the mean of `frame_scores`; None when the clip could not be read.
        error: why it could not be read; None when it could.
    """

    clip_id: str
    clip_sha256: str
    caption_sha256: str
    settings: ScoreSettings
    frame_indices: tuple[int, ...] = ()
    frame_scores: tuple[float, ...] = ()
    score: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What was scored: the clip, its bytes, and its caption."""
        return self.clip_id, self.clip_sha256, self.caption_sha256


def read_rows(path: Path) -> list[ScoreRow]:
    """The rows of a Parquet file, or of all parts in a folder in the order of their names.

    Raises:
        ScoresError: not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[ScoreRow] = []
    for file in sorted(path.glob(PATTERN)) if path.is_dir() else [path]:
        try:
            records = pq.read_table(file, schema=_schema()).to_pylist()
            rows += [_row(record) for record in records]
        except (pa.ArrowException, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ScoresError(f"{file}: no Parquet file of scores ({reason})") from None
    return rows


def write_rows(path: Path, rows: Iterable[ScoreRow]) -> None:
    """Write a Parquet file so that whoever reads it, or kills this, meets the old content or the new one.

    What a killed process leaves, the next one removes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([_record(row) for row in rows], _schema())
    with replacing(path) as temporary, temporary.open("wb") as stream:
        pq.write_table(table, stream)


def common_settings(path: Path, rows: Iterable[ScoreRow]) -> ScoreSettings | None:
    """The settings that all rows share; None for no rows.

    Raises:
        ScoresError: the rows were made with different settings.
    """
    found = sorted({row.settings for row in rows}, key=str)
    if len(found) > 1:
        raise ScoresError(f"{path}: scores of different settings: {found[0]} and {found[1]}")
    return found[0] if found else None


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("clip_id", pa.string(), nullable=False),
            pa.field("clip_sha256", pa.string(), nullable=False),
            pa.field("scorer", pa.string(), nullable=False),
            pa.field("scorer_version", pa.string(), nullable=False),
            pa.field("frame_choice", pa.string(), nullable=False),
            pa.field("frame_indices", pa.list_(pa.int32()), nullable=False),
            pa.field("frame_scores", pa.list_(pa.float64()), nullable=False),
            pa.field("score", pa.float64()),
            pa.field("caption_column", pa.string(), nullable=False),
            pa.field("caption_sha256", pa.string(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )


def _record(row: ScoreRow) -> dict[str, Any]:
    record = asdict(row)
    return {**record.pop("settings"), **record}


def _row(record: dict[str, Any]) -> ScoreRow:
    settings = ScoreSettings(**{name: record.pop(name) for name in ScoreSettings.__dataclass_fields__})
    indices, scores = tuple(record.pop("frame_indices")), tuple(record.pop("frame_scores"))
    return ScoreRow(settings=settings, frame_indices=indices, frame_scores=scores, **record)
