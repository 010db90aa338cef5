"""The mini world's CSV and splits, in UltraVideo's form, from scenes alone (no clip is opened)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from luve_lightning.data.mini_world import captions
from luve_lightning.data.mini_world.photographs import SPLITS
from luve_lightning.data.mini_world.scene import Scene, motion_per_frame, source_pixels
from luve_lightning.data.video_index import COLUMNS


def catalog_csv(scenes: Sequence[Scene]) -> str:
    """Returns the CSV of all clips.

    A photograph plays the part of a source video, and its clips stand in it one after another
    (`start_frame` up to, not including, `end_frame`). Scores: `vtss_score` is photograph pixels per clip
    pixel (1 and more is sharp), `motion_score` is how many pixels the background moves a frame,
    `video_clip_score` is 1, since captions are exact.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    shown: dict[str, int] = {}
    for scene in scenes:
        start = shown.get(scene.url, 0)
        shown[scene.url] = start + scene.frames
        writer.writerow(_row(scene, start))
    return text.getvalue()


def splits_json(scenes: Sequence[Scene]) -> str:
    """Returns which photographs (`url`) each split's clips come from."""
    splits = {split: sorted({scene.url for scene in scenes if scene.split == split}) for split in SPLITS}
    return json.dumps(splits, indent=2) + "\n"


def _row(scene: Scene, start: int) -> dict[str, object]:
    stop = start + scene.frames
    return {
        "clip_id": scene.clip_id,
        "url": scene.url,
        "frame_width": scene.size,
        "frame_height": scene.size,
        "fps": scene.fps,
        "start_frame": start,
        "end_frame": stop,
        "total_frames": scene.frames,
        "start_time": round(start / scene.fps, 4),
        "end_time": round(stop / scene.fps, 4),
        "duration": round(scene.frames / scene.fps, 4),
        "vtss_score": round(source_pixels(scene), 4),
        "motion_score": round(motion_per_frame(scene), 4),
        "video_clip_score": 1.0,
        "Brief Description": captions.brief_description(scene),
        "Detailed Description": captions.detailed_description(scene),
        "Background": captions.background(scene),
        "Theme Description": captions.theme(scene),
        "Style": captions.style(scene),
        "Shot Type": captions.shot_type(scene),
        "Camera Movement": captions.camera_movement(scene),
        "Lighting": captions.lighting(scene),
        "Video Atmosphere": captions.atmosphere(scene),
        "Summarized Description": captions.summarized_description(scene),
    }
