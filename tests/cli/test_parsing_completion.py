from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from luve_lightning.cli.parsing import completion

# What bash does on TAB: the words so far, then the function that `complete` registered.
PRESS_TAB = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE="{words}"; COMP_POINT=${{#COMP_LINE}}
press=$(complete -p luve | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$press luve "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    completion("bash")
    file = tmp_path / "luve.bash"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("luve f", {"fit"}),
        ("luve study b", {"build"}),
        ("luve fit --trainer.max_st", {"--trainer.max_steps"}),
        ("luve fit --ck", {"--ckpt_path"}),
        ("luve generate --negative", {"--negative_prompt", "--negative_prompt_file"}),
        ("luve generate --hei", {"--height"}),
    ],
)
def test_bash_completes_verbs_and_keys(script: Path, words: str, expected: set[str]) -> None:
    program = PRESS_TAB.format(script=script, words=words)
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected, done.stderr


def test_a_script_for_zsh_names_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    completion("zsh")
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef luve")
    assert "--trainer.max_steps" in printed
    if shutil.which("zsh"):
        (tmp_path / "_luve").write_text(printed)
        subprocess.run(["zsh", "-n", str(tmp_path / "_luve")], check=True)
