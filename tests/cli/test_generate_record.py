from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luve_lightning.cascade.generation_jobs import VideoJob
from luve_lightning.cascade.options import CascadeOptions, Guidance, recipe_settings
from luve_lightning.cli.compose import compose, read_arguments
from luve_lightning.cli.generate import command_of
from luve_lightning.cli.keys import Keys
from tests.cli.test_keys import NASTY, texts

# A folder's name: no NUL, no slash, and not only what Python takes for spaces, which is refused.
names = (
    st.one_of(
        st.sampled_from(NASTY),
        st.text(st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp"], exclude_characters="\0/"), min_size=1),
    )
    .filter(str.strip)
    .map(lambda name: Path(name))
)


def command(prompt: str, negative: str | None, folder: Path) -> str:
    options = {
        "backbone": "data/mini/wan",
        "output": folder,
        "experts": {"lfe": folder, "hfe": None},
        "guidance": Guidance(),
        "cascade": True,
        "prompts": Path("p.txt"),
        "shift": None,
    }
    return command_of(options, VideoJob("name", prompt, negative, 3, 64, 96, 32, 48, 5))


def composed(words: list[str]) -> dict[str, object]:
    arguments = read_arguments(words[2:], "prompt")
    assert not arguments.files
    assert not arguments.help
    return compose([], arguments.options, Keys("generate"))


@pytest.mark.slow
@settings(deadline=None)
@given(prompt=texts, negative=st.none() | texts, folder=names)
@example(prompt="null", negative="null", folder=Path("~"))
def test_a_recorded_command_says_what_was_done(prompt: str, negative: str | None, folder: Path) -> None:
    config = composed(shlex.split(command(prompt, negative, folder)))
    assert config["prompt"] == prompt
    assert config.get("negative_prompt") == negative
    assert Path(str(config["output"])) == folder
    assert Path(config["experts"]["lfe"]) == folder  # type: ignore[index]
    assert config["cascade"] == "true"
    assert "prompts" not in config


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_a_shell_passes_a_recorded_command_on_unchanged(shell: str) -> None:
    commands = [command(text, text, Path("x")).removeprefix("luve generate ") for text in NASTY]
    script = "".join(f"printf '%s\\0' {words}\nprintf 'next\\0'\n" for words in commands)
    done = subprocess.run([shell, "-c", script], capture_output=True, check=True)
    for text, printed in zip(NASTY, done.stdout.decode().split("\0next\0"), strict=False):
        config = composed(["luve", "generate", *printed.split("\0")])
        assert config["prompt"] == text
        assert config["negative_prompt"] == text
    assert done.stdout.count(b"\0next\0") == len(NASTY)


def test_decoding_in_half_precision_makes_other_videos_and_leaves_earlier_ones_theirs() -> None:
    def recipe(**changes: bool) -> dict[str, object]:
        return recipe_settings(CascadeOptions(64, 96, 5, 32, 48), "float32", None, {}, 16, False, **changes)

    assert recipe() == recipe(decode_half=False)
    assert "decode_half" not in recipe()
    assert recipe(decode_half=True) == recipe() | {"decode_half": True}


def test_threads_of_the_encoder_make_other_lossy_videos_and_leave_earlier_ones_theirs() -> None:
    def recipe(lossless: bool, threads: int) -> dict[str, object]:
        options = CascadeOptions(64, 96, 5, 32, 48)
        return recipe_settings(options, "float32", None, {}, 16, lossless, encoder_threads=threads)

    assert "encoder_threads" not in recipe(False, 1)
    assert recipe(False, 4) == recipe(False, 1) | {"encoder_threads": 4}
    assert recipe(True, 4) == recipe(True, 1)
