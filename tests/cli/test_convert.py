"""`luve convert`: what it writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luve_lightning.models.vluer import ReleasedVLUer, load_vluer
from luve_lightning.tasks import AdaptationTask
from tests.helpers.attending import FrameAttention
from tests.helpers.released import released_content, released_state
from tests.helpers.run_luve import run_luve


def test_convert_vluer_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = ReleasedVLUer()
    torch.save(released_content(released_state(net)), tmp_path / "model.pth")
    done = run_luve(capsys, "convert", "vluer", tmp_path / "model.pth", tmp_path / "vluer", "--crop")
    assert done.code == 0, done.err
    assert "22,110,472 parameters" in done.out.replace("\n", " ")
    for said in (done.out, (tmp_path / "vluer" / "README.md").read_text()):
        assert "CC-BY-NC-4.0: not for commercial use" in " ".join(said.split())
    loaded = load_vluer(tmp_path / "vluer")
    assert loaded.config.crop
    assert torch.equal(loaded.conv.weight, net.conv.weight)


def test_convert_vluer_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    refused = run_luve(capsys, "convert", "vluer", tmp_path / "model.pth", tmp_path / "vluer")
    assert refused.code == 2
    assert [line.partition(": ")[2] for line in refused.error_lines if "expected the released" in line]
    assert not (tmp_path / "vluer").exists()
    (tmp_path / "README.md").write_text("of a project")
    taken = run_luve(capsys, "convert", "vluer", tmp_path / "model.pth", tmp_path)
    assert taken.code == 2
    assert "holds files already: choose a new folder" in taken.err
    third = run_luve(capsys, "convert", "vluer", "a", "b", "c")
    assert third.code == 2
    assert "unexpected argument 'c'; file and output are given already" in third.err


def test_convert_lora_writes_an_adaptations_lora(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AdaptationTask(str(tiny_backbone), lora_rank=2, attention=FrameAttention()).export(tmp_path, None)
    done = run_luve(capsys, "convert", "lora", tmp_path, tmp_path / "lora.safetensors", "--names", "diffsynth")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "20 layers, rank 2, scale 1" in said
    assert "trained with FrameAttention, which is lost where a program attends densely" in said
    keys = load_file(tmp_path / "lora.safetensors")
    assert "blocks.1.cross_attn.o.lora_B.default.weight" in keys
    again = run_luve(capsys, "convert", "lora", tmp_path, tmp_path / "lora.safetensors")
    assert again.code == 2
    (line,) = again.error_lines
    assert line.endswith("lora.safetensors exists already: choose a new name")


def test_convert_lora_refuses_experts(tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = run_luve(capsys, "convert", "lora", tiny_cascade / "experts" / "lfe", tmp_path / "lfe.safetensors")
    assert refused.code == 2
    (line,) = refused.error_lines
    assert "the expert lfe cannot be a LoRA: its low-pass filter acts on the tokens between A and B" in line
    assert not list(tmp_path.iterdir())


def test_help_says_whose_licence(capsys: pytest.CaptureFixture[str]) -> None:
    helped = run_luve(capsys, "convert", "vluer", "--help")
    assert helped.code == 0
    assert "CC-BY-NC-4.0" in "".join(helped.out.split())
    assert "[FILE] [OUTPUT]" in helped.out
    parts = run_luve(capsys, "convert", "--help").out
    assert "convert vluer" in parts
    assert "convert lora" in parts
