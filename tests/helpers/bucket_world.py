"""Clips of several shapes and lengths with their index, for tests of buckets."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from luve_lightning.data.video_index import COLUMNS
from tests.helpers.small_world import write_clip

Shape = tuple[int, int, int]
"""Frames, height and width."""

SIZES = [[32, 64], [48, 48], [64, 32]]
LENGTHS = [1, 5, 9]
TRAIN: Sequence[Shape] = (
    *[(9, 48, 96)] * 3,  # 32x64x9
    *[(11, 64, 64)] * 5,  # 48x48x9
    *[(6, 96, 48)] * 2,  # 64x32x5
    *[(1, 48, 48)] * 3,  # 48x48x1
    *[(4, 40, 70)] * 1,  # 32x64x1
)
VAL: Sequence[Shape] = ((9, 48, 96), (9, 48, 48), (1, 48, 48))


def write_shapes(folder: Path, train: Sequence[Shape] = TRAIN, val: Sequence[Shape] = VAL) -> Path:
    """Clips under `folder/clips`, `splits.json`, and UltraVideo's CSV, whose path is returned.

    Named by their number, frames, height and width.
    """
    rows, splits = [], {"train": ["train"], "val": ["val"], "test": []}
    for number, (split, (frames, height, width)) in enumerate(
        [("train", s) for s in train] + [("val", s) for s in val]
    ):
        name = f"{number:02d}-{frames}-{height}x{width}"
        write_clip(folder / "clips" / f"{name}.mp4", number, frames, height, width)
        row = dict.fromkeys(COLUMNS, "text") | {"clip_id": name, "url": split, "fps": "16"}
        rows.append(row | {"frame_width": width, "frame_height": height, "total_frames": frames})
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder / "clips.csv"
