"""`luve generate` with prompts: from a file, longer than is read, and of any words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.generating import Luve, generating


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], tiny_cascade: Path, tmp_path: Path) -> Luve:
    """Runs the verb; keyword arguments replace options, or remove them when None."""
    return generating(capsys, tiny_cascade, tmp_path / "out", lossless="true")


def test_prompts_longer_than_the_text_encoder_reads_are_told(luve: Luve, tmp_path: Path) -> None:
    """Two prompts that differ past the limit give the same pixels: that is said before, and stands in the JSON."""
    start = "a red boat sails slowly over calm water while birds fly "
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": start + "text " * 4 + word, "name": word} for word in ("left.", "squares")]
    rows += [{"prompt": "a boat", "name": "short", "negative_prompt": "[b] text " * 20}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    outcome = luve(
        prompts=prompts, cascade="false", steps=1, height=32, width=48, motion_height=None, motion_width=None
    )
    assert outcome.code == 0, outcome.err
    assert "longer than the text encoder reads: 3 texts" in outcome.out
    assert f"  {prompts}:1: prompt: 17 tokens, of which the text encoder sees 16; cut off: 'left.'" in outcome.out
    assert f"  {prompts}:3: negative_prompt: 41 tokens" in outcome.out
    assert "UserWarning" not in outcome.err
    assert "CutTextWarning" not in outcome.err
    about = [json.loads((tmp_path / "out" / f"{row['name']}.json").read_text()) for row in rows]
    assert [record.get("cut", {}).keys() for record in about] == [{"prompt"}, {"prompt"}, {"negative_prompt"}]
    assert about[1]["cut"] == {"prompt": "squares"}
    assert about[0]["sha256"] == about[1]["sha256"]


@pytest.mark.parametrize("prompt", ["a: b", "[x]", "42", "true", "- x", "1e3", "a = b"])
def test_any_words_are_a_prompt(luve: Luve, prompt: str) -> None:
    for words in ([f"--prompt={prompt}"], ["--seed=1", prompt] if prompt[0] != "-" else ["--prompt", prompt]):
        outcome = luve(*words, "--print_config")
        assert yaml.safe_load(outcome.out)["prompt"] == prompt


def test_a_file_is_checked_whole_before_its_first_video(luve: Luve, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "height": 50, "width": 96}\n')
    outcome = luve(prompts=path)
    assert outcome.code == 2
    assert f"prompts: {path}:2: height 50: expected a multiple of 16, nearest are 48 and 64" in outcome.err
    assert not (tmp_path / "out").exists()
