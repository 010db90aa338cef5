"""A few real clips with their index, and a tiny real VAE, for tests of what reads and encodes them."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from luve_lightning.data.video_index import COLUMNS


def write_backbone(folder: Path, seed: int = 0, latents_std: float = 1.0) -> Path:
    """A pipeline folder with a VAE of base_dim 4 and random weights; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, latents_std=[latents_std] * 16)
    vae.save_pretrained(folder / "vae")
    return folder


def write_clip(path: Path, seed: int, frames: int = 9, height: int = 48, width: int = 48) -> Path:
    """One H.264 clip of drifting texture that differs from seed to seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height // 4 + frames, width // 4 + frames, 3), dtype=np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"preset": "ultrafast", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 16)
        stream.codec_context.thread_count = 1
        for index in range(frames):
            part = picture[index : index + height // 4, index : index + width // 4]
            image = np.ascontiguousarray(part.repeat(4, axis=0).repeat(4, axis=1))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_index(path: Path, clips: Sequence[Path], frames: int = 9, height: int = 48, width: int = 48) -> Path:
    """UltraVideo's CSV for clips, each of a source video of its own; returns the CSV."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for number, clip in enumerate(clips):
            row = dict.fromkeys(COLUMNS, "text")
            row |= {"clip_id": clip.stem, "url": f"source-{number}", "frame_width": str(width)}
            row |= {"frame_height": str(height), "fps": "16", "start_frame": "0", "end_frame": str(frames)}
            row |= {"total_frames": str(frames), "start_time": "0", "end_time": "1", "duration": str(frames / 16)}
            row |= {"vtss_score": "1", "motion_score": "1", "video_clip_score": "1"}
            writer.writerow(row)
    return path


def write_world(folder: Path, count: int, frames: int = 9, height: int = 48, width: int = 48) -> Path:
    """`count` clips under `folder/clips` and their index, whose path is returned."""
    clips = []
    for seed in range(count):
        name = hashlib.sha1(str(seed).encode(), usedforsecurity=False).hexdigest()
        clips.append(write_clip(folder / "clips" / f"{name}.mp4", seed, frames, height, width))
    return write_index(folder / "clips.csv", clips, frames, height, width)


def add_row(index: Path, **changes: str) -> None:
    """Add a row to a CSV: its first one with these columns changed."""
    with index.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    with index.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, COLUMNS).writerow(rows[0] | changes)


def change_rows(index: Path, number: int = 0, **changes: str) -> None:
    """Change columns of one row of a CSV, the first unless told otherwise."""
    with index.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows[number] |= changes
    with index.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
