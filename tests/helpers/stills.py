"""A few real stills of several kinds with their index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from luve_lightning.data.clips import probe_clip
from luve_lightning.data.index_file import IndexRow, write_index
from luve_lightning.data.splits import Split
from luve_lightning.data.video_index import ClipEntry

SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "val", "test")
CAPTION = "text"  # a word that the tiny tokenizer knows


def write_stills(folder: Path, height: int = 60, width: int = 64, transparent: bool = False) -> list[Path]:
    """Six pictures: PNG, a turned JPEG, a 16-bit TIFF, WebP, PNG with alpha, AVIF; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, suffix in enumerate(("png", "jpg", "tif", "webp", "png", "avif")):
        pixels = np.random.default_rng(number).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        pixels = pixels.repeat(4, axis=0).repeat(4, axis=1)
        path = folder / f"still {number} ünd.{suffix}"
        if suffix == "tif":
            tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric="rgb")
        elif suffix == "jpg":
            picture = Image.fromarray(np.rot90(pixels).copy())
            exif = picture.getexif()
            exif[274] = 6  # turned to the right when shown
            picture.save(path, exif=exif, quality=95)
        elif number == 4:
            alpha = np.full((height, width, 1), 255, np.uint8)
            alpha[:8, :8] = 0 if transparent else 255
            Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(path)
        else:
            Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def still_entry(path: Path, number: int) -> ClipEntry:
    """The entry of a still, whose caption is `CAPTION`."""
    info = probe_clip(path)
    return ClipEntry(
        clip_id=f"still-{number}",
        path=path.resolve(),
        url=f"source-{number}",
        fps=0.0,
        total_frames=1,
        width=info.width,
        height=info.height,
        captions={"caption": CAPTION},
        still=True,
    )


def write_still_index(folder: Path, transparent: bool = False) -> Path:
    """Six pictures and their index, as `luve index` writes it: four to train on, one held out for each other split."""
    paths = write_stills(folder / "stills", transparent=transparent)
    rows = [IndexRow(path.resolve(), still_entry(path, n), SPLITS[n]) for n, path in enumerate(paths)]
    index = folder / "stills.parquet"
    write_index(index, rows)
    return index
