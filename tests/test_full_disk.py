"""A disk that fills up: the error names the file, nothing half is left, and the next run goes on."""

from __future__ import annotations

import errno
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luve_lightning.cli.run_verb import run_verb
from tests.helpers.evaluation import write_methods


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let every write beyond so many bytes of a file fail, which Python and the libraries meet as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def words(tiny_backbone: Path, tiny_clips: Path, tiny_cascade: Path, tmp_path: Path) -> dict[str, list[str]]:
    """What each verb needs; OUT is where it writes."""
    world = [f"--backbone={tiny_backbone}", f"--index={tiny_clips / 'clips.csv'}"]
    sizes = ["--size=[48, 48]", "--frames=9"]
    methods = write_methods(tmp_path / "methods", 2, {"near": 2.0, "far": 20.0})
    folders = [f"--videos={name}={folder}" for name, folder in methods.items()]
    trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return {
        "precompute": [*world, *sizes, "--scales=[2]", *trainer, "--store=OUT"],
        "embed": [*world, "--dtype=float32", "--device=cpu", "--length=16", "--store=OUT"],
        "score": [world[1], "--batch_size=2", "--scorer=luve_lightning.data.scorers.SharpnessExposure", "--output=OUT"],
        "upsample": [*world, *sizes, "--scale=2", "--baselines=[bilinear]", "--device=cpu", "--output=OUT"],
        "evaluate": [
            *folders,
            "--metrics.redness=tests.helpers.evaluation_metrics.Redness",
            f"--metrics.redness.log={tmp_path / 'log'}",
            "--device=cpu",
            "--output=OUT/table.csv",
        ],
        "generate": [
            "a red boat",
            f"--backbone={tiny_cascade / 'wan'}",
            f"--vluer={tiny_cascade / 'vluer'}",
            *(
                "--height=64",
                "--width=96",
                "--num_frames=5",
                "--steps=2",
                "--skip_steps=1",
                "--device=cpu",
                "--output=OUT",
            ),
        ],
    }


@pytest.mark.slow
@pytest.mark.usefixtures("capsys")  # pytest's other way of capturing writes files
@pytest.mark.parametrize(
    ("verb", "size"),
    [("precompute", 2000), ("embed", 100), ("score", 1000), ("upsample", 3000), ("evaluate", 300), ("generate", 2000)],
)
def test_a_full_disk_is_named_and_leaves_nothing_half(
    words: dict[str, list[str]], tmp_path: Path, verb: str, size: int
) -> None:
    out = tmp_path / "out"
    options = [word.replace("OUT", str(out)) for word in words[verb]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # caches say that they are kept in memory
        with largest_file(size), pytest.raises(OSError, match="File too large") as error:
            run_verb(verb, options, {})
        assert error.value.errno == errno.EFBIG
        named = Path(str(error.value.filename))
        assert named.is_relative_to(out)
        assert not named.name.startswith(".")
        assert named.suffix != ".tmp"
        assert not left_over(out)
        assert not named.exists()
        run_verb(verb, options, {})
    # Denoised latents wait only until their video is written.
    waited = ".claims" in named.parts and any(out.glob("*.mp4"))
    assert waited != named.is_file()
    assert not left_over(out)


def left_over(folder: Path) -> list[Path]:
    """Temporary files and locks."""
    return [path for path in folder.rglob("*") if path.is_file() and (path.name[0] == "." or path.suffix == ".tmp")]
