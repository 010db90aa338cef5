"""Scores of clips as Parquet: one row per clip, one file per process; which frames and clips a process scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.files import replacing, text_digest
from luve_lightning.terminal import amount

PATTERN = "part-*.parquet"


class ScoresError(ValueError):
    """Scores that are missing, damaged, or not the requested ones; the message is one line."""


@dataclass(frozen=True)
class Shard:
    """One of `count` processes that share the clips, `index` counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected i/n with 0 <= i < n, got {self}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def file_name(self) -> str:
        """The file of its part of the scores."""
        return f"part-{self.index:05d}-of-{self.count:05d}.parquet"


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard named by an option or torchrun's environment; everything when neither does.

    Args:
        text: "i/n", or None.
        environment: may hold RANK and WORLD_SIZE.

    Raises:
        ValueError: no such share, or both name one.
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    if text is None:
        return Shard(int(environment.get("RANK", "0")), processes) if processes > 1 else Shard()
    if processes > 1:
        raise ValueError(f"shard: torchrun's {processes} processes share the clips by themselves; leave out {text!r}")
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()):
        raise ValueError(f"shard: expected i/n such as 0/4, got {text!r}")
    return Shard(int(first), int(second))


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip are scored.

    Attributes:
        count: number of frames, the middles of equal parts of the clip. A shorter clip gives all its frames.
        indices: these instead, counted from 0.
    """

    count: int = 4
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"frames: expected at least 1, got {self.count}")
        if self.indices is not None and (not self.indices or min(self.indices) < 0):
            raise ValueError(f"indices: expected one or more frame numbers >= 0, got {list(self.indices)}")

    def __str__(self) -> str:
        if self.indices is None:
            return f"{self.count} frames equally spaced"
        return f"frames {', '.join(map(str, self.indices))}"

    def of(self, total_frames: int) -> tuple[int, ...]:
        """The frame numbers for a clip of this length."""
        if self.indices is not None:
            return self.indices
        return tuple(dict.fromkeys((2 * i + 1) * total_frames // (2 * self.count) for i in range(self.count)))


@dataclass(frozen=True)
class ScoreSettings:
    """What a set of scores has in common; scores of different settings are never mixed.

    Attributes:
        scorer: `Scorer.name`.
        scorer_version: `Scorer.version`.
        caption_column: caption that frames were scored against, a name of `CAPTIONS`.
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
        caption_sha256: sha256 of the caption as UTF-8.
        settings: how it was scored.
        frame_indices: numbers of the scored frames, from 0.
        frame_scores: their scores.
        score: mean of `frame_scores`; None when the clip could not be read.
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
    """Write a Parquet file atomically.

    The next call removes what a killed process left.
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


_NAMED = 3  # most clips named in a message


class ClipScores:
    """The scores of a set of clips, all by one scorer with one set of settings.

    Args:
        source: where they come from, for messages; `ClipHashes` are kept beside it.
        rows: one or more per clip. Where a clip was scored again because its bytes changed, each row belongs to
            the bytes that it names.
        settings: what all rows have in common.
    """

    def __init__(self, source: Path, rows: Iterable[ScoreRow], settings: ScoreSettings) -> None:
        self.source, self.settings = source, settings
        self._rows: dict[tuple[str, str, str], ScoreRow] = {}
        for row in rows:
            if row.key not in self._rows or self._rows[row.key].score is None:
                self._rows[row.key] = row
        self._named = {row.clip_id: row for row in self._rows.values()}

    @classmethod
    def read(cls, path: str | Path) -> ClipScores:
        """Read what `luve score` wrote.

        Args:
            path: its folder, or one Parquet file.

        Raises:
            FileNotFoundError: it does not exist.
            ScoresError: not such a file, or scores that do not belong together.
        """
        source = Path(path)
        if not source.exists():
            raise FileNotFoundError(f"{source}: no scores; `luve score` makes them")
        rows = read_rows(source)
        settings = common_settings(source, rows)
        if settings is None:
            raise ScoresError(f"{source}: holds no scores; `luve score` makes them")
        return cls(source, rows, settings)

    def __len__(self) -> int:
        return len(self._named)

    def keep(
        self, entries: Sequence[ClipEntry], threshold: float, scorer: str, hashes: ClipHashes | None = None
    ) -> tuple[list[ClipEntry], str]:
        """The clips whose score is above a threshold (LuVe, arXiv 2602.11564: HPS v3 > 6.5).

        Args:
            entries: clips to choose from; each must have been scored, or found unreadable.
            threshold: threshold on the scale of `scorer`.
            scorer: measure that the threshold is meant for, `Scorer.name`.
            hashes: hashes of the clips; default those remembered beside the scores.

        Returns:
            The clips, in the given order, and how many of how many by which score, in one line.

        Raises:
            ScoresError: scores by another scorer or of other clips (no score, other bytes, another caption), or
                none above the threshold.
        """
        if scorer != self.settings.scorer:
            raise ScoresError(
                f"{self.source}: scores by {self.settings.scorer!r}, but the threshold {threshold:g} is for {scorer!r}"
            )
        folder = self.source if self.source.is_dir() else self.source.parent
        found = self._matching(entries, hashes or ClipHashes(folder))
        scored = [(entry, row.score) for entry, row in zip(entries, found, strict=True) if row.score is not None]
        kept = [entry for entry, score in scored if score > threshold]
        unreadable = len(entries) - len(scored)
        without = f", {unreadable} unreadable" if unreadable else ""
        if not kept:
            highest = max((score for _, score in scored), default=None)
            best = "none has a score" if highest is None else f"the highest has {highest:.4g}"
            raise ScoresError(
                f"{self.source}: none of {amount(len(entries), 'clip')} is above {threshold:g} by {scorer}{without}; "
                f"{best}"
            )
        by = f"{scorer} ({self.settings.scorer_version})"
        return (
            kept,
            f"{len(kept)} of {amount(len(entries), 'clip is', 'clips are')} above {threshold:g} by {by}{without}",
        )

    def _matching(self, entries: Sequence[ClipEntry], hashes: ClipHashes) -> list[ScoreRow]:
        """The row for each clip's current file."""
        found: list[ScoreRow] = []
        missing: list[str] = []
        changed: list[str] = []
        for entry in entries:
            row = self._named.get(entry.clip_id)
            if row is None:
                missing.append(f"{entry.clip_id} has no score")
                continue
            caption = text_digest(entry.captions[self.settings.caption_column])
            digest = _digest_or_empty(entry, hashes)
            row = self._rows.get((entry.clip_id, digest, caption))
            if row is not None:
                found.append(row)
            elif any(key[:2] == (entry.clip_id, digest) for key in self._rows):
                changed.append(f"{entry.clip_id} has another {self.settings.caption_column}")
            else:
                changed.append(f"{entry.clip_id} has other bytes")
        wrong = [*missing, *changed]
        if wrong:
            some = "; ".join(wrong[:_NAMED]) + (" ..." if len(wrong) > _NAMED else "")
            raise ScoresError(
                f"{self.source}: not the scores of these clips, {len(wrong)} of {len(entries)} differ: {some} "
                "(`luve score` scores what is missing)"
            )
        return found


def _digest_or_empty(entry: ClipEntry, hashes: ClipHashes) -> str:
    try:
        return hashes.digest(entry.path, entry.matte)
    except (OSError, ClipError):
        return ""  # like the row of a clip that could not be read
