"""Scores of clips, and the selection of training clips by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luve_lightning.datasets.clip_hashes import ClipHashes
from luve_lightning.datasets.clip_types import ClipError
from luve_lightning.datasets.score_table import (
    ScoreRow,
    ScoresError,
    ScoreSettings,
    common_settings,
    read_rows,
)
from luve_lightning.datasets.video_index import ClipEntry
from luve_lightning.files import text_digest

__all__ = ["ClipScores", "KeptClips", "ScoresError", "caption_digest"]

_NAMED = 3  # clips named in a message


@dataclass(frozen=True)
class KeptClips:
    """Clips that a threshold let pass.

    Attributes:
        entries: the clips, in the order given.
        summary: how many of how many, by which score, in one line.
    """

    entries: list[ClipEntry]
    summary: str


class ClipScores:
    """The scores of a set of clips, all by one scorer with one set of settings.

    Args:
        source: where they come from, for messages; `ClipHashes` are kept beside it.
        rows: one or more a clip. Where a clip was scored again because its bytes changed, each row stands for the
            bytes that it names.
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
            FileNotFoundError: nothing is there.
            ScoresError: no such file, or scores that do not belong together.
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
    ) -> KeptClips:
        """The clips whose score is above a threshold (LuVe, arXiv 2602.11564: HPS v3 > 6.5).

        Args:
            entries: the clips to choose from; each must have been scored, or found unreadable.
            threshold: on the scale of `scorer`.
            scorer: which measure the threshold is meant for, `Scorer.name`.
            hashes: of the clips; default those remembered beside the scores.

        Raises:
            ScoresError: scores of another scorer or other clips (no score, other bytes, another caption), or none
                above the threshold.
        """
        if scorer != self.settings.scorer:
            raise ScoresError(
                f"{self.source}: scores by {self.settings.scorer!r}, but the threshold {threshold:g} is for {scorer!r}"
            )
        folder = self.source if self.source.is_dir() else self.source.parent
        found = self._matching(entries, hashes or ClipHashes(folder))
        scored = [
            (entry, row.score) for entry, row in zip(entries, found, strict=True) if row.score is not None
        ]
        kept = [entry for entry, score in scored if score > threshold]
        unreadable = len(entries) - len(scored)
        without = f", {unreadable} unreadable" if unreadable else ""
        if not kept:
            highest = max((score for _, score in scored), default=None)
            best = "none has a score" if highest is None else f"the highest has {highest:.4g}"
            raise ScoresError(
                f"{self.source}: none of {len(entries)} clips is above {threshold:g} by {scorer}{without}; {best}"
            )
        by = f"{scorer} ({self.settings.scorer_version})"
        return KeptClips(
            kept, f"{len(kept)} of {len(entries)} clips are above {threshold:g} by {by}{without}"
        )

    def _matching(self, entries: Sequence[ClipEntry], hashes: ClipHashes) -> list[ScoreRow]:
        """The row of each clip as it is now."""
        found: list[ScoreRow] = []
        missing: list[str] = []
        changed: list[str] = []
        for entry in entries:
            row = self._named.get(entry.clip_id)
            if row is None:
                missing.append(f"{entry.clip_id} has no score")
                continue
            caption = caption_digest(entry.captions[self.settings.caption_column])
            digest = _digest_or_empty(entry.path, hashes)
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


def caption_digest(caption: str) -> str:
    """sha256 of a caption as UTF-8, 64 hex digits."""
    return text_digest(caption)


def _digest_or_empty(path: Path, hashes: ClipHashes) -> str:
    try:
        return hashes.digest(path)
    except (OSError, ClipError):
        return ""  # as in the row of a clip that could not be read
