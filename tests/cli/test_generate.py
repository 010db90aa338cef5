"""`luve generate` on the tiny backbone: what it writes, repeats, skips and refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from luve_lightning.cascade import LuVePipeline
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.video_files import read_video
from luve_lightning.evaluation.video_sets import find_video_sets
from tests.helpers.generating import PROMPT, SIZES, Luve, generating
from tests.helpers.run_luve import run_luve


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path) -> Luve:
    """Runs the verb; keyword arguments replace options, or remove them when None."""
    return generating(capsys, tiny_cascade, tmp_path / "out", lossless="true")


def made(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The only video of a folder and its JSON file's content."""
    (video,) = folder.glob("*.mp4")
    return video, json.loads(video.with_suffix(".json").read_text())


def test_a_prompt_becomes_the_video_that_the_pipeline_makes(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    outcome = luve(PROMPT, seed=4, **{"guidance.scale": 3.0})
    assert outcome.code == 0, outcome.err
    video, about = made(tmp_path / "out")
    assert re.fullmatch(r"a-red-boat-sails-slowly-seed4-[0-9a-f]{8}", video.stem)
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    want = pipeline(PROMPT, **SIZES, steps=3, skip_steps=1, guidance=3.0, generator=generator).frames[0]
    frames, fps = read_video(video)
    assert np.array_equal(frames, (want * 255).round().astype(np.uint8))
    assert fps == about["fps"] == 16
    assert about["prompt"] == PROMPT
    assert [(s["stage"], s["height"], s["width"], s["latents"]) for s in about["stages"]] == [
        ("motion", 32, 48, [16, 2, 4, 6]),
        ("upsampled", 64, 96, [16, 2, 8, 12]),
        ("refined", 64, 96, [16, 2, 8, 12]),
        ("decoded", 64, 96, [16, 2, 8, 12]),
    ]
    assert all(stage["seconds"] >= 0 for stage in about["stages"])
    assert [(step["stage"], step["step"]) for step in about["steps"]] == [
        *(("motion", n) for n in range(3)),
        *(("refined", n) for n in (1, 2)),
    ]
    assert about["packages"]["torch"]
    assert about["threads"] == torch.get_num_threads()
    assert about["recipe"]["models"].keys() == {"backbone", "vluer"}
    assert "written        1 video" in outcome.out
    assert f"{video}  " in outcome.out


@pytest.mark.slow
def test_the_command_in_the_json_file_repeats_the_video_bit_by_bit(
    luve: Luve, capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    line = {
        "prompt": "{a \"red\" boat, $sails ${height} '#5'\n--x}",
        "seed": 9,
        "height": 96,
        "width": 144,
        "negative_prompt": "null",
    }
    prompts.write_text(json.dumps(line))
    options = {"prompts": prompts, "experts.lfe": tiny_cascade / "experts" / "lfe", "lossless": None}
    options |= {"refiner": tiny_cascade / "refiner", "guidance.high": 0.9, "shift": 3.0}
    assert luve(**options).code == 0
    video, about = made(tmp_path / "out")
    assert (about["recipe"]["motion_height"], about["recipe"]["motion_width"]) == (48, 64)
    words = shlex.split(about["command"])
    assert words[:2] == ["luve", "generate"]
    outcome = run_luve(capsys, *words[1:], "--output", tmp_path / "again")
    assert outcome.code == 0, outcome.err
    again, other = made(tmp_path / "again")
    assert again.read_bytes() == video.read_bytes()
    assert other["sha256"] == about["sha256"]
    assert {k: v for k, v in other["recipe"].items() if k != "name"} == {
        k: v for k, v in about["recipe"].items() if k != "name"
    }


@pytest.mark.parametrize("prompt", ["null", "--debug", "- a ${height}"])
def test_a_prompt_is_what_stands_on_the_command_line(luve: Luve, tmp_path: Path, prompt: str) -> None:
    outcome = luve(f"--negative_prompt={prompt}", "--", prompt, steps=2)
    assert outcome.code == 2  # options stand before --
    outcome = luve(f"--prompt={prompt}", f"--negative_prompt={prompt}", steps=2)
    assert outcome.code == 0, outcome.err
    _, about = made(tmp_path / "out")
    assert (about["recipe"]["prompt"], about["recipe"]["negative_prompt"]) == (prompt, prompt)


@pytest.mark.slow
def test_the_seed_decides(luve: Luve, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert luve(PROMPT, seed=seed).code == 0
    first, second = (path.read_bytes() for path in sorted((tmp_path / "out").glob("*.mp4")))
    assert first != second
    assert luve(PROMPT, seed=0, output=tmp_path / "more").code == 0
    assert made(tmp_path / "more")[0].read_bytes() == first


@pytest.mark.slow
def test_stages_are_kept_drawn_and_taken_up_again(luve: Luve, tmp_path: Path) -> None:
    options = {"keep_stages": "true", "contact_sheet": "true"}
    assert luve(PROMPT, **options).code == 0
    out = tmp_path / "out"
    video, about = made(out)
    assert read_video(out / "motion" / video.name)[0].shape == (5, 32, 48, 3)
    assert read_video(out / "upsampled" / video.name)[0].shape == (5, 64, 96, 3)
    with Image.open(video.with_suffix(".jpg")) as sheet:
        assert sheet.width > 5 * 192
    assert len(list(out.glob("latents/*/*.safetensors"))) == 2
    whole = video.read_bytes()
    video.with_suffix(".jpg").unlink()
    assert luve(PROMPT, **options).code == 0
    again = made(out)[1]
    assert [stage["seconds"] is None for stage in again["stages"]] == [True, True, False, False]
    assert video.with_suffix(".jpg").is_file(), "what was asked for is missing: it is made"
    assert video.read_bytes() == whole, "the refinement's noise must not depend on where the motion came from"
    # Another refinement of the same motion; another upsampling of it.
    assert luve(PROMPT, **options, skip_steps=2, upsampling="latent", vluer=None, overwrite="true").code == 0
    other = made(out)[1]
    assert [stage["seconds"] is None for stage in other["stages"]] == [True, False, False, False]
    assert other["sha256"] != about["sha256"]
    sets = find_video_sets({"motion": out / "motion", "upsampled": out / "upsampled", "refined": out})
    assert sets.names == [video.stem]
    assert sets.prompts == {video.stem: PROMPT}
    assert sets.motions == {"motion": {}, "upsampled": {}, "refined": {video.stem: out / "motion" / video.name}}
    # Made differently and nothing kept: what was kept before is another video's.
    assert luve(PROMPT, overwrite="true", latents=out / "latents", seed=0, steps=2).code == 0
    assert find_video_sets({"refined": out}).motions == {"refined": {}}


@pytest.mark.slow
def test_runs_share_the_latents_of_earlier_stages(luve: Luve, tmp_path: Path) -> None:
    """The first makes motion and upsampling alone; the second refines what it finds, as if it had made it itself."""
    shelf = tmp_path / "shelf"
    assert luve(PROMPT, output=tmp_path / "motion", latents=shelf, skip_steps=3).code == 0
    assert luve(PROMPT, output=tmp_path / "refined", latents=shelf).code == 0
    assert luve(PROMPT, output=tmp_path / "alone").code == 0
    video, about = made(tmp_path / "refined")
    assert [s["seconds"] is None for s in about["stages"]] == [True, True, False, False]
    assert len(list(shelf.glob("*/*.safetensors"))) == 2
    other, _ = made(tmp_path / "alone")
    assert video.read_bytes() == other.read_bytes()
    assert made(tmp_path / "motion")[0].read_bytes() != other.read_bytes()
    assert not [folder for folder in tmp_path.glob("*/*") if folder.name in ("latents", "motion", "upsampled")]
    assert "--latents" not in about["command"]


def test_the_first_prompts_of_a_file(luve: Luve, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    assert luve(prompts=tmp_path / "prompts.txt", limit=2).code == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    outcome = luve(prompts=tmp_path / "prompts.txt", limit=0)
    assert outcome.code == 2
    assert "limit: expected at least 1 prompt, got 0" in outcome.err


def test_a_prompt_file_with_seeds_sizes_and_names(luve: Luve, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a red boat"},
        {"prompt": "a red boat", "seed": 1},
        {"prompt": "calm water", "name": "water", "num_frames": 1, "height": 32, "width": 48},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    outcome = luve(prompts=path)
    assert outcome.code == 0, outcome.err
    assert "written        3 videos" in outcome.out
    names = sorted(file.name for file in (tmp_path / "out").iterdir() if file.suffix in (".mp4", ".png"))
    assert [name[:16] for name in names] == ["a-red-boat-seed0", "a-red-boat-seed1", "water.png"]
    assert read_video(tmp_path / "out" / "water.png")[0].shape == (1, 32, 48, 3)


def test_what_is_there_is_not_made_again_and_no_model_is_loaded(
    luve: Luve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert luve(PROMPT).code == 0
    video, _ = made(tmp_path / "out")
    before = video.stat().st_mtime_ns
    monkeypatch.setattr(LuVePipeline, "from_pretrained", None)
    outcome = luve(PROMPT)
    assert outcome.code == 0, outcome.err
    assert "already there  1" in outcome.out
    assert video.stat().st_mtime_ns == before
    outcome = luve(PROMPT, steps=4)
    assert outcome.code == 2
    assert "was made differently (steps 3, now 4); choose another --output, or --overwrite" in outcome.err


def test_models_are_loaded_while_their_files_are_hashed(
    luve: Luve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    outcome = luve(PROMPT, **{"experts.lfe": tmp_path / "empty"})
    assert outcome.code == 2
    assert outcome.error_lines == [f"luve generate: error: {tmp_path / 'empty'}: no model files there"]
    begun: list[bool] = []
    digests = FileHashes.digests
    monkeypatch.setattr(FileHashes, "digests", lambda *given: (begun.append(True), digests(*given))[1])

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("cannot be loaded" if not begun else "was hashed first")

    monkeypatch.setattr(LuVePipeline, "from_pretrained", fail)
    outcome = luve(PROMPT)
    assert outcome.code == 2
    assert outcome.error_lines == ["luve generate: error: cannot be loaded"]
    assert begun, "what is wrong with files would be told first"


@pytest.mark.slow
def test_experts_act_in_their_bands_and_can_be_switched_off(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    folder = tiny_cascade / "experts"
    both = {"experts.lfe": folder / "lfe", "experts.hfe": folder / "hfe"}
    used = {}
    for name, options in {
        "both": both,
        "folder": {"experts": folder},
        "lfe": both | {"experts.hfe": "null"},
        "switched": both | {"switch": 0.5},
        "none": {},
    }.items():
        outcome = luve(PROMPT, output=tmp_path / name, steps=6, **options)
        assert outcome.code == 0, outcome.err
        about = made(tmp_path / name)[1]
        used[name] = about["sha256"]
        for step in about["steps"]:
            want: str | None = "lfe" if step["sigma"] >= (0.5 if name == "switched" else 0.875) else "hfe"
            if step["stage"] == "motion" or name == "none" or (name == "lfe" and want == "hfe"):
                want = None
            assert step["expert"] == want, (name, step)
    assert used["folder"] == used["both"]
    assert len(set(used.values())) == 4


@pytest.mark.slow
def test_a_plain_lora_changes_both_stages(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = "diffusion_model.blocks.0.self_attn.q"
    shapes = {f"{layer}.lora_down.weight": (2, 24), f"{layer}.lora_up.weight": (24, 2)}
    shapes |= {"diffusion_model.blocks.1.norm3.diff": (24,), "diffusion_model.blocks.1.norm3.diff_b": (24,)}
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    file = tmp_path / "lora.safetensors"
    save_file(weights, file)
    videos = {}
    for name, options in {"with": {"lora": file}, "without": {}}.items():
        outcome = luve(PROMPT, output=tmp_path / name, keep_stages="true", **options)
        assert outcome.code == 0, outcome.err
        video, about = made(tmp_path / name)
        assert ("lora" in about["recipe"]["models"]) == (name == "with")
        line = f"LoRA {file}: 2 layers, rank 2, scale 1, 1 biases, 1 weight difference"
        assert (line in outcome.out.splitlines()) == (name == "with")
        assert about.get("lora", {}).get("scales") == ([1.0] if name == "with" else None)
        videos[name] = [read_video(path)[0] for path in (video.parent / "motion" / video.name, video)]
    assert not any(map(np.array_equal, videos["with"], videos["without"]))


@pytest.mark.slow
def test_a_lora_acts_at_the_scale_beside_it(luve: Luve, tiny_cascade: Path, tmp_path: Path) -> None:
    """PEFT's folder at alpha 16 is not the file alone, and what was made of one is no video of the other."""
    generator = torch.Generator().manual_seed(0)
    key = "base_model.model.blocks.0.attn1.to_q.lora_{}.weight"
    weights = {
        key.format(half): torch.randn(shape, generator=generator)
        for half, shape in {"A": (4, 24), "B": (24, 4)}.items()
    }
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    first = luve(PROMPT, lora=folder)
    assert f"LoRA {folder}: 1 layer, rank 4, scale 1 (assumed: no adapter_config.json beside it)\n" in first.out
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    again = luve(PROMPT, lora=folder)
    assert again.code == 2
    assert "was made differently (models.lora " in again.err
    file = folder / "adapter_model.safetensors"
    other = luve(PROMPT, lora=file, output=tmp_path / "other")
    assert f"LoRA {file}: 1 layer, rank 4, scale 4\n" in other.out
    (one,), (two,) = (tmp_path / "out").glob("*.mp4"), (tmp_path / "other").glob("*.mp4")
    assert not np.array_equal(read_video(one)[0], read_video(two)[0])
    twice = luve(PROMPT, lora=folder, lora_scale=4, output=tmp_path / "refused")
    assert "lora_scale 4 is for a file that says no scale; here it is " in twice.err
    (folder / "adapter_config.json").unlink()
    given = luve(PROMPT, lora=file, lora_scale=4, output=tmp_path / "given")
    assert f"LoRA {file}: 1 layer, rank 4, scale 4\n" in given.out
    (three,) = (tmp_path / "given").glob("*.mp4")
    assert np.array_equal(read_video(two)[0], read_video(three)[0])
    assert "was made differently (models.lora " in luve(PROMPT, lora=file, output=tmp_path / "given").err
    alone = luve(PROMPT, lora_scale=4, output=tmp_path / "refused")
    assert "lora_scale: is for a LoRA, and there is none (--lora)" in alone.err
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 4}))
    refused = luve(PROMPT, lora=folder, output=tmp_path / "refused")
    assert (refused.code, len(refused.error_lines)) == (2, 1)
    assert 'peft_type is "OFT", which cannot be honoured' in refused.err
    expert = luve(PROMPT, lora=tiny_cascade / "experts" / "lfe", output=tmp_path / "refused")
    assert (expert.code, len(expert.error_lines)) == (2, 1)
    assert "is an expert of LuVe" in expert.err
    assert not (tmp_path / "refused").exists()


def test_one_stage_at_full_size(luve: Luve, tmp_path: Path) -> None:
    assert luve(PROMPT, cascade="false", vluer=None, contact_sheet="true").code == 0
    about = made(tmp_path / "out")[1]
    assert [stage["stage"] for stage in about["stages"]] == ["direct", "decoded"]
    assert about["stages"][0]["latents"] == [16, 2, 8, 12]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([PROMPT], {"height": 100}, "height 100: expected a multiple of 16, nearest are 96 and 112"),
        ([PROMPT], {"width": 8}, "width 8: expected a multiple of 16, nearest are 16 and 32"),
        ([PROMPT], {"num_frames": 16}, "num_frames 16: expected 4k + 1, nearest are 13 and 17"),
        ([PROMPT], {"motion_height": 96}, "motion_height x motion_width 96x48: larger than the video's 64x96"),
        ([PROMPT], {"skip_steps": 4}, "steps 3 and skip_steps 4: expected at least 1 step, and 0 to all skipped"),
        ([PROMPT], {"vluer": None}, "vluer: required, but not given; --upsampling latent or rgb needs none"),
        ([PROMPT], {"vluer": "nowhere"}, "vluer: nowhere: no such file or folder"),
        ([PROMPT], {"experts.lfe": "nowhere"}, "experts.lfe: nowhere: no such file or folder"),
        ([PROMPT], {"backbone": "nowhere"}, "backbone nowhere: no such folder"),
        ([PROMPT], {"prompts": "p.txt"}, "expected a prompt, or --prompts FILE, and not both"),
        ([], {}, "expected a prompt, or --prompts FILE, and not both"),
        ([], {"prompts": "p.txt"}, "prompts: p.txt: no such file"),
        ([" "], {}, "prompt: expected some words, got none"),
        (["\u200b\ufeff"], {}, "prompt: expected some words, got invisible characters only: '\\u200b\\ufeff'"),
        ([PROMPT], {"length": 0}, "length: expected at least 1 token, got 0"),
        ([PROMPT], {"switch": 1.5}, "switch: expected a sigma between 0 and 1, got 1.5"),
        ([PROMPT], {"device": "meta"}, "device: no meta here; expected auto, cpu, cuda or cuda:N"),
        ([PROMPT], {"output": __file__}, f"output: expected a folder, {__file__} is a file"),
        (
            [PROMPT],
            {"guidance": "5"},
            "guidance: expected keys inside, such as --guidance.KEY VALUE, or a file of them, got '5'",
        ),
        ([PROMPT], {"speed": "{cache_threshold: .nan}"}, "speed.cache_threshold: expected a number, got nan"),
        (["a", "boat"], {}, "unexpected argument 'boat'; prompt is given already, quote it"),
        ([PROMPT], {"fps": 0}, "fps: expected a number in (0, 240], got 0.0"),
        ([PROMPT], {"guidance.scale": 0.5}, "guidance scale 0.5: expected a number >= 1"),
        ([PROMPT], {"guidance.sale": 2}, "guidance.sale: unknown key"),
        ([PROMPT], {"context_parallel": 2}, "context_parallel 2: expected 1, or the number of processes"),
        ([PROMPT], {"speed.cache": "magic"}, "speed.cache: expected first_block, taylorseer or null, got 'magic'"),
    ],
)
def test_impossible_wishes_are_one_line_before_anything_is_loaded(
    luve: Luve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(LuVePipeline, "from_pretrained", None)
    outcome = luve(*words, **options)
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message in line
    assert not list(tmp_path.glob("out/*.mp4"))


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0, "context_parallel: one video is spread over GPUs, and there is none here"),
        (2, "device: 3 processes take a GPU each, and PyTorch sees 2 GPUs here"),
        (3, "context_parallel 3: the transformer's 2 attention heads are spread evenly; expected one of 1, 2"),
    ],
)
def test_gpus_that_cannot_share_a_video_are_refused_before_anything_is_loaded(
    luve: Luve, monkeypatch: pytest.MonkeyPatch, gpus: int, message: str
) -> None:
    """The first of three processes, on a machine with some GPUs."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    for place in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(place, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(LuVePipeline, "from_pretrained", None)
    outcome = luve(PROMPT, context_parallel=3, device="auto")
    assert outcome.code == 2
    assert [line for line in outcome.error_lines if message in line] == outcome.error_lines
