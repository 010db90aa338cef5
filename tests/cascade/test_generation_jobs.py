"""Which videos are made, by whom, and what another process leaves behind."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.cascade.generation_jobs import StageLatents, VideoFolder, VideoJob, make_jobs, run_jobs
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.data.prompts import PromptLine
from luve_lightning.models.backbones import SizeRules
from tests.helpers.store_size import store_size

RULES = SizeRules(16, 4)
DEFAULTS = CascadeOptions(192, 192, 17, 96, 96)
SETTINGS: dict[str, Any] = {"steps": 4, "guidance": {"scale": 5.0}, "shape": (1, 2)}
LINES = [PromptLine(f"boat {n}", where=f"p.txt:{n}") for n in range(1, 5)]


def write(folder: VideoFolder, job: VideoJob) -> None:
    """What a run leaves of a finished video."""
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.video(job).write_bytes(b"video")
    folder.video(job).with_suffix(".json").write_text(json.dumps({"recipe": folder.recipe(job)}))


@pytest.mark.parametrize(
    ("size", "motion"),
    [((192, 192), (96, 96)), ((192, None), (96, 96)), ((384, 384), (192, 192)), ((96, 80), (48, 32))],
)
def test_a_line_with_a_size_of_its_own_keeps_the_scale(size: tuple[int, int | None], motion: tuple[int, int]) -> None:
    (job,) = make_jobs([PromptLine("a", height=size[0], width=size[1])], DEFAULTS, RULES)
    assert (job.height, job.width) == (size[0], size[1] or 192)
    assert (job.motion_height, job.motion_width) == motion


def test_a_motion_of_no_given_size_is_that_of_the_scale() -> None:
    papers = CascadeOptions(1472, 2560, 49)
    (job,) = make_jobs([LINES[0]], papers, RULES)
    assert (job.motion_height, job.motion_width) == (736, 1280)
    (job,) = make_jobs([LINES[0]], replace(papers, motion_height=720, motion_width=1280), RULES)
    assert (job.motion_height, job.motion_width) == (720, 1280)
    (job,) = make_jobs([LINES[0]], replace(papers, cascade=False), RULES)
    assert (job.motion_height, job.motion_width) == (1472, 2560)


def test_a_line_overrides_the_options_and_zero_is_a_seed() -> None:
    line = PromptLine("b", "blur", "mine", 0, num_frames=5)
    (job,) = make_jobs([line], DEFAULTS, RULES, "noise", seed=3)
    assert job == VideoJob("mine", "b", "blur", 0, 192, 192, 96, 96, 5)


def test_videos_of_a_seed_share_their_noise_unless_each_has_its_own() -> None:
    lines = [PromptLine("a", name="a"), PromptLine("b", name="b"), PromptLine("c", seed=7, name="c")]
    assert [job.seed for job in make_jobs(lines, DEFAULTS, RULES, seed=3)] == [3, 3, 7]
    own = [job.seed for job in make_jobs(lines, DEFAULTS, RULES, seed=3, own_noise=True)]
    assert len(set(own)) == 3
    assert own[2] == 7
    assert [job.seed for job in make_jobs(lines[1:], DEFAULTS, RULES, seed=3, own_noise=True)] == own[1:]
    assert not {job.seed for job in make_jobs(lines[:2], DEFAULTS, RULES, seed=4, own_noise=True)} & set(own)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (LINES, {"height": 200}, "^height 200: expected a multiple of 16, nearest are 192 and 208"),
        (LINES, {"num_frames": 16}, "^num_frames 16: expected 4k [+] 1, nearest are 13 and 17"),
        (LINES, {"motion_width": 90}, "^motion_width 90: expected a multiple of 16"),
        (LINES, {"seed": -1}, "^seed: expected a whole number from 0"),
        (LINES, {"scale": 0}, "^scale: expected a number > 0"),
        (
            [LINES[0], PromptLine("b", height=100, where="p:7")],
            {},
            "^prompts: p:7: height 100: expected a multiple of 16",
        ),
        ([PromptLine("b", height=0, where="p:7")], {}, "^prompts: p:7: height 0: expected a multiple of 16"),
        ([PromptLine("b", width=0, where="p:7")], {}, "^prompts: p:7: width 0: expected a multiple of 16"),
        ([LINES[0], replace(LINES[0], where="p:7")], {}, "^prompts: p:7: boat-1-.* is the video of p.txt:1"),
    ],
)
def test_what_cannot_be_made(lines: list[PromptLine], changes: dict[str, Any], message: str) -> None:
    seed = changes.pop("seed", 3)
    with pytest.raises(ValueError, match=message):
        make_jobs(lines, replace(DEFAULTS, **changes), RULES, seed=seed)


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    folder = VideoFolder(tmp_path, SETTINGS)
    jobs = make_jobs(LINES, DEFAULTS, RULES)
    write(folder, jobs[1])
    made: list[str] = []

    def make(job: VideoJob) -> None:
        made.append(job.name)
        write(folder, job)

    totals = run_jobs(jobs, folder, make)
    assert made == [jobs[n].name for n in (0, 2, 3)]
    assert (totals.made, totals.there) == (3, 1)
    assert run_jobs(jobs, VideoFolder(tmp_path, SETTINGS), make).there == 4


def test_a_video_of_other_settings_is_not_replaced_by_accident(tmp_path: Path) -> None:
    (job, *_) = make_jobs(LINES, DEFAULTS, RULES)
    write(VideoFolder(tmp_path, SETTINGS), job)
    other = SETTINGS | {"steps": 8}
    with pytest.raises(ValueError, match=r"made differently \(steps 4, now 8\); choose another --output"):
        VideoFolder(tmp_path, other).is_done(job)
    with pytest.raises(ValueError, match=r"\(guidance[.]scale 5[.]0, now 4[.]0\)"):
        VideoFolder(tmp_path, SETTINGS | {"guidance": {"scale": 4.0}}).is_done(job)
    with pytest.raises(ValueError, match=r"\(cache None, now 'first_block'\)"):
        VideoFolder(tmp_path, SETTINGS | {"cache": "first_block"}).is_done(job)
    assert not VideoFolder(tmp_path, other, overwrite=True).is_done(job)
    assert VideoFolder(tmp_path, SETTINGS, overwrite=True).is_done(job)


def test_half_a_video_is_none_and_its_remains_are_cleared_away(tmp_path: Path) -> None:
    folder = VideoFolder(tmp_path, SETTINGS)
    job, other, *_ = make_jobs(LINES, DEFAULTS, RULES)
    write(folder, job)
    about = folder.video(job).with_suffix(".json")
    whole = folder.video(job).read_bytes()
    facts = json.loads(about.read_text()) | {"sha256": hashlib.sha256(whole).hexdigest()}
    about.write_text(json.dumps(facts))
    assert folder.is_done(job)
    folder.video(job).write_bytes(whole[:-1])
    assert not folder.is_done(job), "a copy that broke off"
    folder.video(job).write_bytes(whole)
    for content in ("", "[]", "{}", about.read_text()[:-9]):
        about.write_text(content)
        assert not folder.is_done(job)
    about.unlink()
    assert not folder.is_done(job), "the video is written before its JSON file"
    remains = [tmp_path / f".{name}.mp4.123.tmp" for name in (job.name, other.name)]
    for path in remains:
        path.touch()
    with folder.claim(job) as mine:
        assert mine
        assert [path.exists() for path in remains] == [False, True], "another video may be in the making"


def test_what_another_process_makes_is_waited_for_and_made_if_that_one_dies(tmp_path: Path) -> None:
    """A second VideoFolder stands for the other process: its lock is another descriptor's."""
    here, there = VideoFolder(tmp_path, SETTINGS), VideoFolder(tmp_path, SETTINGS)
    jobs = make_jobs(LINES, DEFAULTS, RULES)
    held = there.claim(jobs[0])
    assert held.__enter__()
    made: list[str] = []

    def make(job: VideoJob) -> None:
        made.append(job.name)
        write(here, job)
        if job == jobs[-1]:
            held.__exit__(None, None, None)  # it dies without having made the video

    totals = run_jobs(jobs, here, make)
    assert made == [job.name for job in (*jobs[1:], jobs[0])]
    assert totals.made == 4


def test_latents_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    digest = StageLatents.digest({"prompt": "é", "size": [1, 2]})
    assert digest != StageLatents.digest({"prompt": "e", "size": [1, 2]})
    assert digest == StageLatents.digest({"size": (1, 2), "prompt": "é"})
    tensors = {"latents": torch.randn(1, 4, 2, 3, 3), "generator": torch.Generator().get_state()}
    store = StageLatents(tmp_path)
    assert store.get(digest) is None
    store.put(digest, tensors)
    found = StageLatents(tmp_path).get(digest)
    assert found is not None
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert store_size(tmp_path).unfinished == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_damaged_latents_of_a_stage_are_made_again_with_a_word(tmp_path: Path, damage: str) -> None:
    store, digest, tensors = StageLatents(tmp_path), "ab" * 32, {"latents": torch.randn(1, 4, 2, 3, 3)}
    store.put(digest, tensors)
    (path,) = tmp_path.glob("*/*.safetensors")
    content = path.read_bytes()
    flipped = bytes([*content[:-1], content[-1] ^ 0x80])
    path.write_bytes({"cut": content[:-1], "flipped": flipped, "other": b"[" * 50_000}[damage])
    with pytest.warns(UserWarning, match=f"made again: {path}: "):
        assert store.get(digest) is None
    store.put(digest, tensors)
    assert path.read_bytes() == content
