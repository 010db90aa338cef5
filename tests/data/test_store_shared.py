"""Stores of several users: a group that writes together, and a colleague who may only read."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from luve_lightning.cli.precompute import precompute
from luve_lightning.data import hashes as file_hashes
from luve_lightning.data.scorers import SharpnessExposure
from luve_lightning.data.text_store import TextSource, TextStore
from luve_lightning.datamodules import LatentPairsDataModule
from luve_lightning.datamodules.base import vae_fingerprint
from tests.helpers.as_user import run_as
from tests.helpers.small_world import write_backbone, write_clip, write_index

GROUP = 54_321
ANN, BOB, EVE = 54_322, 54_323, 54_324
CLIPS = 4


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder of a group with a backbone, a world and, made by both of its users, the stores."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start processes of other users")
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    before = os.umask(0o022)
    try:
        folder.chmod(0o755)
        write_backbone(folder / "backbone")
        clips = [write_clip(folder / "clips" / f"{number:040x}.mp4", number) for number in range(CLIPS)]
        for bad in (0, CLIPS - 1):
            clips[bad].write_bytes(b"broken")
        write_index(folder / "all.csv", clips)
        write_index(folder / "ann.csv", clips[:3])
        write_index(folder / "bob.csv", clips[1:])
        for name in ("latents", "texts", "scores"):
            (folder / name).mkdir()
            os.chown(folder / name, 0, GROUP)
            (folder / name).chmod(0o2775)
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
        for user, index in ((ANN, "ann.csv"), (BOB, "bob.csv")):
            run_as(user, GROUP, 0o002, make_stores, folder, folder / index)
        yield folder
    finally:
        os.umask(before)
        shutil.rmtree(folder)


def make_stores(folder: Path, index: Path) -> None:
    file_hashes._SETTLED_NS = 0
    precompute(
        str(folder / "backbone"),
        index,
        folder / "latents",
        (48, 48),
        [2.0],
        frames=9,
        max_bad_fraction=0.5,
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )
    vae_fingerprint(folder / "backbone", folder / "latents")
    texts, source = TextStore(folder / "texts"), TextSource("e" * 64, 4, "float32")
    texts.write(source.key(index.stem), torch.ones(2, 3))
    texts.record(source, index.stem)
    from luve_lightning.cli.ratings import score

    score(index, folder / "scores", SharpnessExposure(), max_bad_fraction=0.5)


@pytest.mark.slow
def test_two_users_of_a_group_write_into_one_store(shared: Path) -> None:
    (quarantine,) = (shared / "latents" / "quarantine").iterdir()
    listed = [json.loads(line)["path"] for line in quarantine.read_text().splitlines()]
    assert listed == [str(shared / "clips" / f"{bad:040x}.mp4") for bad in (0, CLIPS - 1)]
    assert len(list((shared / "latents").glob("??/*.safetensors"))) == 2 * (CLIPS - 2)
    files = [path for name in ("latents", "texts", "scores") for path in (shared / name).rglob("*")]
    assert {path.stat().st_uid for path in files} == {ANN, BOB}
    for path in files:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o777 == (0o775 if path.is_dir() else 0o664), f"{path}: {mode:o}"
        assert path.stat().st_gid == GROUP, path
        assert not path.name.startswith("."), f"{path} was left behind"


def read_as_a_colleague(folder: Path, own: Path) -> None:
    """Train on copies of the clips, whose hashes nobody remembers, and on a backbone that nobody has loaded."""
    file_hashes._SETTLED_NS = 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = LatentPairsDataModule(
            own / "all.csv",
            folder / "latents",
            str(own / "backbone"),
            (48, 48),
            [2.0],
            frames=9,
            crop=(3, 4, 4),
            batch_size=1,
        )
        data.setup("fit")
        data.setup("test")
    told_of = [str(warning.message) for warning in told if "cannot be written" in str(warning.message)]
    assert set(told_of) == {
        f"{folder / 'latents'}: cannot be written (Permission denied): what would be remembered there is kept in "
        "memory, and found out again by the next run"
    }
    assert [len(data.pairs[split]) for split in ("train", "val", "test")] == [1, 1, 1]
    assert next(iter(data.train_dataloader()))["hr"].shape == (1, 16, 3, 4, 4)
    assert TextStore(folder / "texts").source().length == 4
    # Everything is there: nothing need be written.
    precompute(
        str(own / "backbone"), own / "all.csv", folder / "latents", (48, 48), [2.0], frames=9,
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )  # fmt: skip


def test_a_colleague_who_may_only_read_trains(shared: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        own.chmod(0o755)
        shutil.copytree(shared / "backbone", own / "backbone")
        good = [shared / "clips" / f"{number:040x}.mp4" for number in range(1, CLIPS - 1)]
        (own / "clips").mkdir()
        copies = [Path(shutil.copy(clip, own / "clips")) for clip in good]
        copies.append(Path(shutil.copy(good[0], own / "clips" / f"{99:040x}.mp4")))
        write_index(own / "all.csv", copies)
        splits = {"train": ["source-0"], "val": ["source-1"], "test": ["source-2"]}
        (own / "splits.json").write_text(json.dumps(splits))
        before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
        printed = run_as(EVE, EVE, 0o022, read_as_a_colleague, shared, own)
        assert "already there  6" in printed
        assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before
