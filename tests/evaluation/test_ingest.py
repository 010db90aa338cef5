"""Three differently named folders of other projects' videos become what `luve evaluate` reads; the rest is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luve_lightning.data.prompts import PromptLine, slug
from luve_lightning.data.video_files import write_video
from luve_lightning.evaluation.ingest import PromptedName, VideoIngest, VideoMatcher, prompted_names
from luve_lightning.evaluation.video_sets import find_video_sets
from tests.helpers.run_luve import Outcome, run_luve

PROMPTS = [
    "A red boat sails on a calm lake, at sunset.",
    "A red boat sails on a stormy sea.",
    "Old coins on a wooden table; the camera zooms in",
    "一只猫在草地上奔跑",
    "A clock at 12",
]
NAMES = [PromptedName(PromptLine(prompt).video_name(0), prompt, 0) for prompt in PROMPTS]


def found(stem: str, names: list[PromptedName] = NAMES, others: tuple[str, ...] = ()) -> str:
    """The name of the prompt that a file is matched with, and its sample; or why not."""
    matcher = VideoMatcher(names)
    matcher.begin([stem, *others])
    try:
        match = matcher.match(stem)
    except ValueError as refused:
        return str(refused)
    return f"{[one.name for one in names].index(match.name.name)} {match.sample}"


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        # Ours, by name.
        (NAMES[2].name, "2 None"),
        # FlashVSR's and other scripts' slugs, whole, cut, with numbers before and signs behind.
        ("a-red-boat-sails-on-a-calm-lake-at-sunset", "0 None"),
        ("A red boat sails on a calm lake, at sunset.", "0 None"),
        ("0001_A_red_boat_sails_on_a_stormy_sea", "1 None"),
        ("a_red_boat_sails_on_a_storm", "1 None"),
        ("old-coins-on-a-wooden-table-the-camera-zooms-in_x4_seed3", "2 None"),
        ("Old coins on a wooden table_flashvsr", "nearest: 'Old coins on a wooden table; the camera zooms in'"),
        ("old_coins_on_a_wooden_table_the_camera_zooms_in_venhancer_s4_up4", "2 None"),
        ("一只猫在草地上奔跑", "3 None"),
        ("一只猫在草地上奔跑_0", "3 0"),
        # FlashVSR's own, of a video of ours, and with words of its own before a prompt.
        (f"FlashVSR_v1.1_Full_{NAMES[1].name}_seed0", "1 None"),
        ("FlashVSR_Tiny_old_coins_on_a_wooden_table_the_camera_zooms_in_seed0", "2 None"),
        ("both_a_red_boat_sails_on_a_stormy_sea_and_old_coins_on_a_wooden_table_the_camera_zooms_in", "2 prompts fit"),
        # VBench's.
        ("A red boat sails on a calm lake, at sunset.-3", "0 3"),
        ("A clock at 12", "4 None"),
        ("A clock at 12-0", "4 0"),
        ("old-coins-on-a-wooden-table-the-camera-zooms-in-2-venhancer", "2 2"),
        # Nothing to go by.
        ("a-red-boat-sails-on", "2 prompts fit: "),
        ("a-red", "nearest: "),
        ("a-green-hill", "no prompt is near"),
        ("12", "a number alone, and none of 0 or the last: say --first 0 or --first 1"),
        ("___", "no prompt is near"),
    ],
)
def test_a_files_name_tells_its_prompt(stem: str, expected: str) -> None:
    assert found(stem).startswith(expected)


@pytest.mark.parametrize(
    ("stem", "others", "expected"),
    [
        # What all files begin with may be the maker's; then a beginning of the prompt's words is enough.
        ("FlashVSR_Full_a_red_boat_sails_on_a_storm_seed0", ("FlashVSR_Full_old_coins_seed0",), "1 None"),
        ("FlashVSR_Full_a_red_boat_sails_on_a_storm", ("VSR_Full_old_coins",), "nearest: "),
        ("0003", ("0000", "0001"), "3 None"),
        ("video_3", ("video_5", "video_1"), "2 None"),
        ("1_1088_1920_81", ("0_1088_1920_81",), "1 None"),  # UltraWan's
        ("output-7", ("output-0",), "number 7 of 5 prompts, the first of which is 0"),
        ("0003", ("0002",), "a number alone"),
    ],
)
def test_the_other_files_tell_what_a_name_means(stem: str, others: tuple[str, ...], expected: str) -> None:
    assert found(stem, others=others).startswith(expected)


def test_samples_and_seeds_tell_videos_of_one_prompt_apart() -> None:
    names = [PromptedName(f"boat-seed{seed}", "A red boat", seed) for seed in (7, 8)] + NAMES
    assert found("a-red-boat-1", names) == "1 None"
    assert found("a-red-boat-seed8", names) == "1 None"
    assert found("a-red-boat-seed-7", names) == "0 None"
    assert found("a-red-boat", names).startswith("2 videos have this prompt: boat-seed7, boat-seed8")
    assert found("a-red-boat-5", names).startswith("2 videos have this prompt")
    # "A red boat 2" is a prompt, and the name of the third sample of another.
    both = [PromptedName("a", "A red boat"), PromptedName("b", "A red boat 2")]
    assert found("a-red-boat-2", both).startswith("2 prompts fit: 'A red boat' or 'A red boat 2'")


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(min_size=1, max_size=80), number=st.integers(0, 999))
def test_any_prompts_own_slug_finds_it(prompt: str, number: int) -> None:
    names = [PromptedName("ours-1", prompt), PromptedName("ours-2", "another prompt of several words")]
    if slug(prompt) != "video" and slug(prompt, 1000) not in (slug(names[1].prompt, 1000), "ours-1", "ours-2"):
        assert found(slug(prompt, 1000), names) == "0 None"
        assert found(f"{number:04d}_{slug(prompt, 1000)}", names).split(" ")[0] in ("0", "2")


def clip(path: Path, level: int = 0) -> Path:
    write_video(path, np.full((2, 16, 16, 3), level, np.uint8), 8)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """FlashVSR's, VEnhancer's and UltraWan's ways of naming; the last two lack some and have more."""
    for number, prompt in enumerate(PROMPTS):
        clip(tmp_path / "flash" / f"FlashVSR_v1.1_Full_{slug(prompt, 30)}_seed0.mp4", number)
        clip(tmp_path / "venhancer" / f"{prompt}.mp4", 10 + number)
        clip(tmp_path / "ultrawan" / f"{number}_1088_1920_81.mp4", 20 + number)
    clip(tmp_path / "venhancer" / "A green hill.mp4")
    (tmp_path / "ultrawan" / "4_1088_1920_81.mp4").write_text("no video")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return {name: tmp_path / name for name in ("flash", "venhancer", "ultrawan")}


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tmp_path: Path, folders: dict[str, Path]) -> Callable[..., Outcome]:
    def run(**options: object) -> Outcome:
        given: dict[str, object] = {f"videos.{name}": folder for name, folder in folders.items()}
        given |= {"output": tmp_path / "out", "prompts": tmp_path / "prompts.txt"}
        return run_luve(capsys, "ingest", *(f"--{k}={v}" for k, v in (given | options).items()))

    return run


def test_three_folders_are_brought_in_and_the_rest_is_named(
    luve: Callable[..., Outcome], tmp_path: Path, folders: dict[str, Path]
) -> None:
    outcome = luve()
    assert outcome.code == 0, outcome.err
    assert "brought in     14 videos" in outcome.out
    assert "venhancer: 5 brought in, 0 already there" in outcome.out
    assert "A green hill.mp4: no prompt is near" in outcome.out
    assert "4_1088_1920_81.mp4: " in outcome.out
    out = tmp_path / "out"
    sets = find_video_sets({name: out / name for name in folders})
    assert sets.missing() == {"ultrawan": [NAMES[4].name]}
    assert sets.prompts == {one.name: one.prompt for one in NAMES}
    video = out / "flash" / f"{NAMES[1].name}.mp4"
    assert video.resolve() == folders["flash"].resolve() / f"FlashVSR_v1.1_Full_{slug(PROMPTS[1], 30)}_seed0.mp4"
    about = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    assert (about["method"], about["fps"], about["frames"], about["height"]) == ("flash", 8, 2, 16)
    assert about["source"]["file"] == str(video.resolve())
    report = json.loads((out / "ingest.json").read_text(encoding="utf-8"))
    assert report["venhancer"]["unmatched"] == [["A green hill.mp4", "no prompt is near"]]
    assert report["ultrawan"]["missing"] == [NAMES[4].name]


def test_the_same_command_goes_on_and_overwrites_nothing(
    luve: Callable[..., Outcome], tmp_path: Path, folders: dict[str, Path]
) -> None:
    luve(copy="true")
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert not any(path.is_symlink() for path in before)
    assert "brought in     0 videos\n  already there  14" in luve(copy="true").out
    # Killed between the video and its record, and before the video.
    first, second = sorted((out / "flash").glob("*.json"))[:2]
    first.unlink()
    second.unlink()
    second.with_suffix(".mp4").unlink()
    assert "brought in     2 videos\n  already there  12" in luve(copy="true").out
    kept = {path: time for path, time in before.items() if path != second.with_suffix(".mp4")}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # Another file of the same name is neither taken for the first nor put over it.
    source = folders["flash"] / f"FlashVSR_v1.1_Full_{slug(PROMPTS[0], 30)}_seed0.mp4"
    source.unlink()
    clip(source, 200)
    outcome = luve(copy="true")
    assert outcome.code == 2
    assert "is of another video or prompt; nothing is overwritten" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_links_into_the_void_are_renewed(
    luve: Callable[..., Outcome], tmp_path: Path, folders: dict[str, Path]
) -> None:
    luve()
    shutil.move(folders["flash"], tmp_path / "moved")
    outcome = luve(**{"videos.flash": tmp_path / "moved"})
    assert "flash: 5 brought in" in outcome.out
    assert (tmp_path / "out" / "flash" / f"{NAMES[0].name}.mp4").is_file()


def test_two_files_of_one_prompt_are_both_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for stem in ("a_red_boat_sails_on_a_stormy_sea", "a red boat sails on a stormy sea x4"):
        clip(folder / f"{stem}.mp4")
    for sample in (1, 2):
        clip(folder / f"{PROMPTS[2]}-{sample}.mp4", sample)
    done = VideoIngest(tmp_path / "out", NAMES).bring("x", folder)
    assert done.made == 2
    assert sorted(file for file, _ in done.ambiguous) == sorted(
        ["a_red_boat_sails_on_a_stormy_sea.mp4", "a red boat sails on a stormy sea x4.mp4"]
    )
    # The first sample of a prompt has its name, further ones are numbered.
    made = sorted(path.stem for path in (tmp_path / "out" / "x").glob("*.mp4"))
    assert made == sorted([NAMES[2].name, f"{NAMES[2].name}-sample2"])


def test_a_table_says_what_names_do_not(luve: Callable[..., Outcome], tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = folders["flash"]
    for path in folder.glob("*.mp4"):
        path.unlink()
    clip(folder / "xyz.mp4")
    clip(folder / "left.mp4", 1)
    table = tmp_path / "table.csv"
    table.write_text(f'file,prompt\nresults/xyz.mp4,"{PROMPTS[0]}"\ngone.mp4,"{PROMPTS[1]}"\n')
    outcome = luve(**{"tables.flash": table})
    assert outcome.code == 0, outcome.err
    assert f"left.mp4: not in {table}" in outcome.out
    assert f"gone of {table}: no such video" in outcome.out
    assert (tmp_path / "out" / "flash" / f"{NAMES[0].name}.mp4").is_file()
    # Without other prompts, the table's are the prompts.
    (tmp_path / "table.jsonl").write_text(json.dumps({"file": "left", "prompt": "A hill"}) + "\n")
    alone = VideoIngest(tmp_path / "alone", None).bring("flash", folder, tmp_path / "table.jsonl")
    assert alone.made == 1
    assert [path.stem for path in (tmp_path / "alone" / "flash").glob("*.mp4")] == [PromptLine("A hill").video_name(0)]


def test_the_folder_of_a_generation_gives_names_and_prompts(tmp_path: Path) -> None:
    for name, prompt, seed in (("b", "A red boat", 1), ("a", "A red boat", 2), ("c", "A hill", 0)):
        about = {"prompt": prompt, "recipe": {"seed": seed}}
        (tmp_path / f"{name}.json").write_text(json.dumps(about))
    (tmp_path / "other.json").write_text("{}")
    assert [(one.name, one.seed) for one in prompted_names(tmp_path)] == [("c", 0), ("b", 1), ("a", 2)]
    matcher = VideoMatcher(prompted_names(tmp_path), numbered=False)
    assert matcher.match("a-red-boat-seed2").name.name == "a"
    with pytest.raises(ValueError, match="numbers need a file of prompts"):
        matcher.match("3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "null"}, "prompts: required, but not given: flash has no table either (--tables flash=FILE)"),
        ({"tables.other": "x.csv"}, "tables: other is none of the methods flash, venhancer, ultrawan"),
        ({"first": 2}, "first: expected 0 or 1, got 2"),
        ({"videos.flash": "nothing"}, "nothing: no such folder of videos"),
        ({"prompts": "nothing.txt"}, "prompts: nothing.txt: no such file"),
        ({"output": __file__}, f"output: {__file__} is not a folder"),
        ({"output": ".", "videos.flash": "flash"}, "flash is where they would be brought to; choose another --output"),
        ({"videos": "{'../x': .}"}, "videos: '../x': expected letters, digits"),
    ],
)
def test_mistakes_are_one_line(luve: Callable[..., Outcome], options: dict[str, object], message: str) -> None:
    outcome = luve(**options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.error_lines) == 1


def test_a_folder_of_which_nothing_fits_is_an_error(luve: Callable[..., Outcome], tmp_path: Path) -> None:
    clip(tmp_path / "odd" / "hill.mp4")
    none = {
        "videos.flash": "null",
        "videos.venhancer": "null",
        "videos.ultrawan": "null",
        "videos.odd": tmp_path / "odd",
    }
    outcome = luve(**none)
    assert outcome.code == 2
    assert "none of the videos of odd could be brought in" in outcome.err
