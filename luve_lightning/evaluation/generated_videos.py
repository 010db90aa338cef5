"""Writing a generated video: its file, its stages', its contact sheet, and the JSON file that says how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from luve_lightning.datasets.video_files import write_video
from luve_lightning.evaluation.contact_sheet import StageFrames, contact_sheet
from luve_lightning.files import file_digest, replacing, write_text
from luve_lightning.pipelines.generation_jobs import VideoFolder, VideoJob
from luve_lightning.pipelines.generation_run import MadeVideo


def write_generated(
    folder: VideoFolder, job: VideoJob, made: MadeVideo, fps: float, lossless: bool, facts: Mapping[str, Any]
) -> Path:
    """Write a video and what belongs to it, each file at once and complete, the JSON file last.

    The JSON file holds the prompt and fps (where `luve evaluate` looks for them), the `recipe` that decides the
    pixels, every stage's size and seconds, every denoising step with the expert in force, the video file's sha256, and
    `facts`.

    Args:
        folder: where to; it says which files are wanted.
        job: of the video.
        made: the video.
        fps: frames per second.
        lossless: of every video file.
        facts: what else is to be known.

    Returns:
        The JSON file.
    """
    video = folder.video(job)
    about = video.with_suffix(".json")
    about.unlink(missing_ok=True)  # where it is, the video is whole
    for stage in folder.stages:
        if stage in made.stages:
            write_video(folder.stage_video(job, stage), made.stages[stage], fps, lossless)
    write_video(video, made.frames, fps, lossless)
    if folder.sheet:
        _save(sheet_of(job, made), video.with_suffix(".jpg"))
    content = {
        "prompt": job.prompt,
        "fps": fps,
        "recipe": folder.recipe(job),
        "stages": [asdict(report) for report in made.reports],
        "steps": [step._asdict() for step in made.steps],
        "sha256": file_digest(video),
        **facts,
    }
    write_text(about, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return about


def sheet_of(job: VideoJob, made: MadeVideo) -> Image.Image:
    """The contact sheet of a video, a row for each stage."""
    last = next((report.stage for report in reversed(made.reports) if report.stage != "decoded"), "video")
    rows = {**made.stages, last: made.frames}
    return contact_sheet(
        [StageFrames(f"{name}\n{v.shape[1]}x{v.shape[2]}", v) for name, v in rows.items()], job.prompt
    )


def _save(sheet: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=92)
