"""Own clips: the five commands of docs/own-data.md, as they stand there, on folders as people have them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from luve_lightning.data.index_file import IndexRow, read_rows
from tests.helpers.own_clips import write_nasty_folder, write_phone_clips
from tests.helpers.run_luve import Outcome, run_luve

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/own-data.md"
HEADING = "## From a folder of clips to a trained VLUer and LFE"
CLIPS, INDEX = Path("data/own/clips"), Path("data/own/index.parquet")
# Appended to both trainings: the page's take minutes.
FEW_STEPS = [
    *("--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"),
    *("--callbacks.strips", "null", "--data.init_args.batch_size", "2"),
]
COUNTS = re.compile(r"clips: (\d+) train(?:, (\d+) val)?")


def documented_commands() -> list[list[str]]:
    """The words after `luve` of each line of the section's first block."""
    section = PAGE.read_text(encoding="utf-8").split(HEADING)[1]
    lines = section.split("```")[1].strip().splitlines()
    words = [shlex.split(line) for line in lines]
    assert all(line[0] == "luve" for line in words)
    return [line[1:] for line in words]


@dataclass(frozen=True)
class FiveCommands:
    """What the five commands printed, and the index that the first one wrote."""

    outcomes: dict[str, Outcome]
    rows: list[IndexRow]

    def clips_in(self, name: str) -> tuple[int, int]:
        """How many clips a training said that it trains and validates on."""
        found = COUNTS.search(self.outcomes[name].out + self.outcomes[name].err)
        assert found, self.outcomes[name]
        return int(found[1]), int(found[2] or 0)


def run_five_commands(capsys: pytest.CaptureFixture[str], area: int | None = None) -> FiveCommands:
    """Runs them as they stand but for fewer steps and, where it is given, another number of pixels."""
    outcomes = {}
    for words in documented_commands():
        name = "index" if words[0] == "index" else Path(words[-1]).stem
        more = [*FEW_STEPS] if words[0] == "fit" else []
        if area and words[0] in ("precompute", "fit"):
            more += [f"--{'data.init_args.' if words[0] == 'fit' else ''}size.area", str(area)]
        outcomes[name] = outcome = run_luve(capsys, *words, *more)
        assert outcome.code == 0, outcome.err
        assert "Traceback" not in outcome.err
    return FiveCommands(outcomes, read_rows(INDEX))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the repository's experiments and mini backbone, and nothing else; the current one."""
    folder = tmp_path / "checkout"
    (folder / "data").mkdir(parents=True)
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    (folder / "data/mini").symlink_to(REPOSITORY / "data/mini")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb"))
    monkeypatch.chdir(folder)
    return folder


def test_there_are_five_commands_from_a_folder_to_both_models() -> None:
    commands = documented_commands()
    assert [words[0] for words in commands] == ["index", "precompute", "embed", "fit", "fit"]
    assert all((REPOSITORY / words[-1]).is_file() for words in commands[1:])


@pytest.mark.slow
def test_five_commands_make_a_vluer_and_an_lfe_from_ten_phone_clips(
    capsys: pytest.CaptureFixture[str], checkout: Path
) -> None:
    write_phone_clips(CLIPS)
    run = run_five_commands(capsys)
    assert all(row.entry is not None for row in run.rows)
    assert len({row.split for row in run.rows}) >= 2
    for name in ("vluer", "lfe"):
        train, val = run.clips_in(name)
        assert train + val == 10
        assert val >= 1
        assert not any(row.split == "test" for row in run.rows)
        assert re.search(r"next +luve validate --config", run.outcomes[name].out), "there are no clips to test on"
    assert {path.name for path in Path.cwd().iterdir()} == {"data", "experiments", "runs"}
    assert {path.name for path in Path("runs/own").iterdir()} == {"lfe", "vluer"}, "a path follows no run's folder"
    assert all(Path("runs/own", name, "provenance.json").is_file() for name in ("lfe", "vluer"))
    assert Path("runs/own/vluer/vluer/config.json").is_file()
    assert Path("runs/own/lfe/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_five_commands_use_all_that_is_usable_of_a_nasty_folder_and_name_the_rest(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, checkout: Path
) -> None:
    nasty = write_nasty_folder(CLIPS)
    run = run_five_commands(capsys, area=128 * 128)  # what is usable does not depend on the size

    names = {row.path.relative_to(CLIPS).as_posix(): row for row in run.rows}
    taken = {name: row.entry for name, row in names.items() if row.entry is not None}
    assert taken.keys() == {*nasty.usable, *nasty.damaged}, "only decoding shows damage inside a video"
    assert len({entry.clip_id for entry in taken.values()}) == len(taken)
    for name, frames in nasty.clips.items():
        assert (taken[name].still, taken[name].total_frames) == (False, frames), name
    for name in nasty.stills:
        assert (taken[name].still, taken[name].total_frames) == (True, 1), name
    assert [name for name, entry in taken.items() if entry.uneven] == ["variable.mp4"]
    assert {name: text for name, entry in taken.items() if (text := entry.captions["caption"])} == nasty.captions

    assert names.keys() - taken.keys() == nasty.broken.keys()
    for name, words in nasty.broken.items():
        assert words in names[name].reason
    said = run.outcomes["index"].out
    for reason in {row.reason.partition(": ")[0] for row in run.rows if row.entry is None}:
        assert reason in said

    assert re.search(rf"quarantined +{len(nasty.damaged)}\b", run.outcomes["precompute"].out)
    captions = len({"", *nasty.captions.values()})
    assert re.search(rf"embedded +{captions} captions", run.outcomes["embed"].out)
    for training in ("vluer", "lfe"):
        assert sum(run.clips_in(training)) == len(nasty.usable)
    for name, words in nasty.damaged.items():
        assert len(re.findall(rf"no latents, first {Path(name).stem}.*{words}", caplog.text)) == 2
