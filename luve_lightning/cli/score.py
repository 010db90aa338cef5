"""`luve score`: rates clips, for the selection of training clips. Runs without Lightning and diffusers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from luve_lightning.cli import Verb
from luve_lightning.cli.index import entries_of, open_index, print_summary
from luve_lightning.data.clip_scores import read_rows
from luve_lightning.data.quarantine import Quarantine
from luve_lightning.data.score_clips import FrameChoice, ScoreTotals, Shard, parse_shard, score_clips
from luve_lightning.data.scorers import Scorer
from luve_lightning.data.video_index import CAPTION, CAPTIONS, Limits, Split
from luve_lightning.machine import UnitTimes
from luve_lightning.terminal import Steps, amount

VERBS = {
    "score": Verb(
        "Data", "score clips, for selecting training clips", examples=("experiments/score/mini.yaml",), goes_on=True
    )
}


def score(
    index: Path,
    output: Path,
    scorer: Scorer,
    caption: str = "Summarized Description",
    frames: int = 4,
    indices: list[int] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    shard: str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
    measured: Path | None = None,
) -> None:
    """Scores several frames of each clip against its caption, into Parquet files.

    A clip that has its score is skipped, so an interrupted run continues. Unreadable clips are named with the
    reason, in the Parquet files, too. Under torchrun the processes share the clips.

    Args:
        index: UltraVideo's CSV, or an index that luve index made.
        output: Folder of the scores, one Parquet file per shard.
        scorer: Rates a frame, e.g. {class_path: luve_lightning.data.scorers.HPSv3Scorer}.
        caption: Column of the index that frames are scored against.
        frames: Frames per clip, equally spaced; the score is their mean.
        indices: Frame numbers, counted from 0, instead of equally spaced ones.
        splits: Splits to score, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside a CSV, else the index's own folder.
        keep: Which clips of the index to take.
        shard: This process's share of the clips: i/n, counted from 0. Default RANK/WORLD_SIZE as set by torchrun,
            else all clips.
        batch_size: Clips scored and written at once, the most that a kill can lose.
        num_workers: Threads that decode ahead; 0 decodes between the batches.
        max_bad_fraction: Share of clips that may be unreadable before the run stops; two always may, unless it is
            0.
        measured: Also write what it took to this file, FILE.json: seconds in all, of the first batch and of each later
            clip, and GPU memory. Under torchrun the first process's.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"expected batch_size >= 1 and num_workers >= 0, got {batch_size} and {num_workers}")
    if caption not in (*CAPTIONS, CAPTION):
        raise ValueError(
            f"caption: expected one of {', '.join(CAPTIONS)}, or {CAPTION} for clips of one's own, got {caption!r}"
        )
    choice = FrameChoice(frames, None if indices is None else tuple(indices))
    own = parse_shard(shard, os.environ)
    # Under torchrun the first process speaks for all.
    entries = entries_of(
        open_index(Console(emoji=False, quiet=os.environ.get("RANK", "0") != "0"), index, clips, keep), splits
    )
    bad = Quarantine(output / "unreadable.jsonl", max_bad_fraction, len(entries), [entry.path for entry in entries])
    console, started = Console(emoji=False), time.perf_counter()
    times = UnitTimes("clip")
    with Steps(Console(emoji=False, quiet=own.index > 0)) as steps:
        steps.begin("clips", len(entries[own.index :: own.count]))
        totals = score_clips(
            entries, scorer, output, caption, choice, own, batch_size, num_workers, bad, steps.advance, times
        )
    _report(console, output, own, scorer, totals, started)
    if own.index == 0:
        count = len(entries[:: own.count])
        times.write(
            measured, processes=own.count, units=count, total=count, there=totals.there, made=count - totals.there
        )


def _report(console: Console, output: Path, shard: Shard, scorer: Scorer, totals: ScoreTotals, started: float) -> None:
    scores = [row.score for row in read_rows(output) if row.score is not None]
    spread = ""
    if scores:
        low, middle, high = np.quantile(scores, (0.1, 0.5, 0.9))
        spread = f"  of all {len(scores)}    10 % below {low:.4g}, half below {middle:.4g}, 90 % below {high:.4g}"
    lines = [
        f"  scored         {amount(totals.scored, 'clip')}",
        f"  already there  {totals.there}",
        f"  unreadable     {len(totals.unreadable)}",
        *(f"    {clip_id}: {reason}" for clip_id, reason in totals.unreadable),
        spread,
    ]
    print_summary(console, f"{output}, shard {shard}, by {scorer.name} ({scorer.version})", lines, started)
