"""`luve inspect`: what it says of real small files of every kind, and of files that are none of them."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from luve_lightning.__main__ import main
from luve_lightning.callbacks import AtomicCheckpointIO
from luve_lightning.models.vluer import ReleasedVLUer
from luve_lightning.tasks import AdaptationTask, ExpertTask
from tests.helpers.attending import LearnedFrameAttention
from tests.helpers.released import released_content, released_state
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.tiny_flow import make_trainer
from tests.helpers.tiny_wan import LFE, tiny_transformer
from tests.helpers.wan_files import own_config, own_weights, write_weights

Inspect = Callable[..., dict[str, Any]]
TRANSFORMER = "as --refiner or --transformer, or the backbone of a task that needs a transformer alone"
FACT = re.compile(r"  (\S.{13}) (.*)")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Inspects one path: its kind and facts, as JSON; the text says the same."""

    def inspect(path: Path, *options: object, code: int = 0) -> dict[str, Any]:
        done = run_luve(capsys, "inspect", path, *options, "--json", "true")
        assert done.code == code, done.err
        (found,) = json.loads(done.out)
        assert found["path"] == str(path)
        lines = run_luve(capsys, "inspect", path, *options).out.splitlines()
        assert lines[0] == f"{path}: {found['kind']}"
        names = [match[1].strip() for match in map(FACT.fullmatch, lines[1:]) if match]
        assert names == list(found["facts"])
        return {"kind": found["kind"], **found["facts"]}

    return inspect


def saved_checkpoint(task: Any, path: Path) -> Path:
    trainer = make_trainer(path.parent, plugins=AtomicCheckpointIO())
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path


def test_backbones_and_their_parts(tiny_cascade: Path, told: Inspect) -> None:
    whole = told(tiny_cascade / "wan")
    assert (whole["kind"], whole["pipeline"], whole["used"]) == ("backbone", "LuVePipeline", "as --backbone")
    assert whole["transformer"].startswith("WanTransformer3DModel, 2 layers, 2 heads, text 16, patch 1 x 2 x 2, 16")
    assert "shift 5" in whole["scheduler"]
    assert not {"missing", "not used", "damaged"} & whole.keys()
    transformer = told(tiny_cascade / "refiner")
    assert (transformer["kind"], transformer["family"]) == ("transformer", "wan")
    assert transformer["used"] == TRANSFORMER
    for part, kind in (("vae", "VAE"), ("text_encoder", "text encoder"), ("tokenizer", "tokenizer")):
        assert told(tiny_cascade / "wan" / part)["kind"] == kind
    file = told(tiny_cascade / "wan" / "vae" / "diffusion_pytorch_model.safetensors")
    assert (file["kind"], file["class"]) == ("VAE", "AutoencoderKLWan")


def test_weights_that_are_not_those_of_the_configuration(tiny_cascade: Path, tmp_path: Path, told: Inspect) -> None:
    folder = shutil.copytree(tiny_cascade / "refiner", tmp_path / "refiner")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["strange"] = weights.pop("proj_out.bias")
    weights["proj_out.weight"] = weights["proj_out.weight"][:-1].clone()
    save_file(weights, file)
    found = told(folder)
    assert found["missing"] == "1 tensor, for instance proj_out.bias"
    assert found["not used"] == "1 tensor, for instance strange"
    assert found["other shapes"] == "1 tensor, for instance proj_out.weight"
    assert found["used"] == "nowhere: refused, since the weights are not those of the configuration"
    file.unlink()
    assert told(folder)["kind"] == "transformer without weights"
    backbone = shutil.copytree(tiny_cascade / "wan", tmp_path / "wan")
    assert told(backbone)["used"] == "as --backbone"
    for weights_there in (backbone / "transformer").glob("*.safetensors"):
        weights_there.unlink()
    found = told(backbone)
    assert (found["kind"], found["incomplete"]) == ("parts of a backbone", ["transformer"])
    tiny_transformer(in_channels=12).save_pretrained(tmp_path / "image-to-video")
    found = told(tmp_path / "image-to-video")
    assert found["used"] == "nowhere: the transformer takes 12 latent channels and gives 4"


def test_wans_own_layout(tmp_path: Path, told: Inspect) -> None:
    transformer = tiny_transformer(num_attention_heads=1, attention_head_dim=128)
    bare = write_weights(tmp_path / "bare.safetensors", own_weights(transformer))
    found = told(bare)
    assert (found["kind"], found["family"], found["layout"]) == ("transformer", "wan", "original names")
    assert found["used"] == TRANSFORMER
    assert "num_layers 2" in found["sizes"]
    prefixed = own_weights(transformer, "model.diffusion_model.", torch.bfloat16)
    found = told(write_weights(tmp_path / "comfyui.safetensors", prefixed))
    assert found["prefix"] == "model.diffusion_model."
    assert found["weights"].endswith("BF16")
    prefixed.popitem()
    found = told(write_weights(tmp_path / "part.safetensors", prefixed))
    assert found["used"].startswith("nowhere: 1 weight missing")
    torch.save(own_weights(transformer), tmp_path / "wan.pth")
    assert told(tmp_path / "wan.pth")["used"] == "nowhere: a pickle; expected a .safetensors file"
    vae = {"decoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1), "conv1.bias": torch.ones(4)}
    torch.save(vae, tmp_path / "Wan2.1_VAE.pth")
    found = told(tmp_path / "Wan2.1_VAE.pth")
    assert (found["kind"], found["layout"]) == ("VAE", "original names")
    assert found["used"] == "nowhere: holds Wan's VAE, which is taken from vae/ of a diffusers pipeline folder"
    folder = tmp_path / "folder"
    write_weights(folder / "diffusion_pytorch_model.safetensors", own_weights(transformer))
    (folder / "config.json").write_text(json.dumps(own_config(transformer)))
    assert told(folder)["layout"] == "original names"


@pytest.mark.slow
def test_vluers(tiny_cascade: Path, tmp_path: Path, told: Inspect) -> None:
    found = told(tiny_cascade / "vluer")
    assert (found["kind"], found["class"]) == ("VLUer", "VLUer")
    assert told(tiny_cascade / "vluer" / "diffusion_pytorch_model.safetensors")["kind"] == "VLUer"
    net = ReleasedVLUer()
    torch.save(released_content(released_state(net)), tmp_path / "model.pth")
    released = told(tmp_path / "model.pth")
    assert released["kind"] == "released VLUer's file"
    assert released["weights"].startswith("1,724 tensors")
    assert released["used"] == "by luve convert vluer"
    assert "CC-BY-NC" in released["licence"]
    assert {"missing", "unknown"}.isdisjoint(released)
    net.save_pretrained(tmp_path / "converted")
    assert told(tmp_path / "converted")["class"] == "ReleasedVLUer"
    lacking = released_content({"conv.weight": net.conv.weight})
    torch.save(lacking, tmp_path / "part.pth")
    part = told(tmp_path / "part.pth")
    assert part["missing"].startswith("1,723 tensors")
    assert part["used"] == "nowhere: not the released VLUer's names"
    short = released_content({**released_state(net), "conv.bias": torch.zeros(8)})
    torch.save(short, tmp_path / "short.pth")
    assert "1 of another shape, such as conv.bias (8 instead of 16)" in told(tmp_path / "short.pth")["used"]


def test_experts(tiny_cascade: Path, capsys: pytest.CaptureFixture[str], told: Inspect) -> None:
    lfe = told(tiny_cascade / "experts" / "lfe")
    assert (lfe["kind"], lfe["name"], lfe["place"], lfe["rank"]) == ("expert", "lfe", ["attention"], 4)
    assert lfe["scale"] == "2 (alpha 8)"
    assert lfe["filter"] == "low-pass, cutoff 0.5 of Nyquist, ideal, along h w"
    assert lfe["band"] == "sigma 0.875 to 1"
    assert lfe["used"].startswith("as --experts.lfe")
    assert told(tiny_cascade / "experts" / "hfe" / "adapter_model.safetensors")["kind"] == "expert"
    both = json.loads(run_luve(capsys, "inspect", tiny_cascade / "experts", "--json").out)
    assert [one["facts"]["name"] for one in both] == ["hfe", "lfe"]


def test_loras(tiny_backbone: Path, tmp_path: Path, told: Inspect) -> None:
    AdaptationTask(str(tiny_backbone), lora_rank=2).export(tmp_path, None)
    own = told(tmp_path / "transformer" / "lora", "--backbone", tiny_backbone)
    assert (own["kind"], own["names"], own["rank"], own["scale"]) == ("LoRA", ["PEFT"], [2], ["1"])
    assert own["layers"] == "20 in 2 blocks"
    assert own["used"].startswith(f"as --lora with {tiny_backbone}: LoRA ")
    assert told(tmp_path)["kind"] == "parts of a backbone"
    assert told(tmp_path / "transformer")["lora"] == "lora/, merged into these weights already"
    halves = {"lora_down": torch.ones(4, 24), "lora_up": torch.ones(24, 4)}
    kohya = {f"lora_unet_blocks_9_self_attn_q.{half}.weight": x for half, x in halves.items()}
    kohya["lora_unet_blocks_9_self_attn_q.alpha"] = torch.tensor(2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    found = told(tmp_path / "kohya.safetensors")
    assert (found["names"], found["scale"]) == (["kohya's trainers, musubi-tuner"], ["0.5"])
    assert found["scale from"] == "its alpha tensors"
    strange = told(tmp_path / "kohya.safetensors", "--backbone", tiny_backbone)
    assert strange["used"].startswith(f"not with {tiny_backbone}: LoRA ")
    assert "blocks_9_self_attn_q" in strange["used"]
    shutil.copytree(tmp_path / "transformer" / "lora", tmp_path / "pissa")
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path / "pissa", tmp_path / "pissa" / "adapter_model.safetensors"):
        refused = told(path)
        assert (refused["kind"], "cannot be honoured" in refused["used"]) == ("LoRA", True)
    torch.save(kohya, tmp_path / "kohya.pt")
    assert told(tmp_path / "kohya.pt")["kind"] == "LoRA"
    difference = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(24)}
    save_file(difference, tmp_path / "difference.safetensors")
    found = told(tmp_path / "difference.safetensors", "--backbone", tiny_backbone)
    assert (found["updates"], found["rank"]) == (["1 bias difference"], "none")
    assert found["used"].startswith(f"as --lora with {tiny_backbone}: LoRA ")
    kohya |= {"blocks.0.oft": torch.ones(2)}
    save_file(kohya, tmp_path / "more.safetensors")
    more = told(tmp_path / "more.safetensors")
    assert more["unknown"] == "1 tensor, for instance blocks.0.oft"
    assert more["used"].startswith("nowhere: 1 tensor not part of a LoRA")


def test_checkpoints(tiny_backbone: Path, tmp_path: Path, told: Inspect) -> None:
    task = ExpertTask(str(tiny_backbone), LFE, "lfe")
    found = told(saved_checkpoint(task, tmp_path / "expert.ckpt"))
    assert (found["kind"], found["written by"], found["weights of"]) == ("checkpoint", "luve fit", ["transformer"])
    assert json.loads(found["expert"])["name"] == "lfe"
    assert found["used"] == "as --ckpt_path, with the configuration of its run"
    assert found["step"] == 0
    torch.save({"pytorch-lightning_version": "2.0", "state_dict": {"x": torch.ones(2)}}, tmp_path / "other.ckpt")
    other = told(tmp_path / "other.ckpt")
    assert (other["written by"], other["used"]) == ("Lightning 2.0, another program", "nowhere")


def test_stores(tiny_latents: Path, tiny_texts: Path, told: Inspect) -> None:
    latents = told(tiny_latents)
    assert latents["kind"] == "store of latents"
    assert any("48x48" in size for size in latents["size"])
    assert told(tiny_texts)["kind"] == "store of embeddings"
    entry = told(next(tiny_latents.glob("*/*.safetensors")))
    assert entry["kind"] == "stored latents"
    assert entry["shape"].startswith("16 x ")


def test_what_holds_no_weights_of_ours(tiny_clips: Path, tmp_path: Path, told: Inspect) -> None:
    (tmp_path / "notes.txt").write_text("weights\nare elsewhere")
    found = told(tmp_path / "notes.txt")
    assert (found["kind"], found["first line"], found["used"]) == ("text file", "weights", "not as weights")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    assert told(tmp_path / "x.png")["kind"] == "image (PNG)"
    assert told(next((tiny_clips / "clips").glob("*.mp4")))["kind"] == "video (MP4 or MOV)"
    (tmp_path / "x.bin").write_bytes(bytes(range(128, 200)))
    assert told(tmp_path / "x.bin")["kind"] == "unknown file"
    save_file({f"encoder.{n}": torch.ones(2) for n in range(9)}, tmp_path / "other.safetensors")
    other = told(tmp_path / "other.safetensors")
    assert other["kind"] == "unknown weights"
    assert other["first keys"] == [f"encoder.{n}" for n in range(5)]
    for n in (1, 2):
        save_file({f"part.{n}": torch.ones(2)}, tmp_path / f"llm-0000{n}-of-00002.safetensors")
    assert told(tmp_path / "llm-00002-of-00002.safetensors")["first keys"] == ["part.1", "part.2"]
    torch.save({"x": torch.ones(2), "more": 3}, tmp_path / "other.pt")
    assert told(tmp_path / "other.pt")["first keys"] == ["x", "more"]
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path("x"), protocol=2))
    assert told(tmp_path / "code.pt")["kind"] == "pickle of code"
    (tmp_path / "folder" / "empty").mkdir(parents=True)
    assert told(tmp_path / "folder" / "empty")["kind"] == "empty folder"
    shutil.copy(tmp_path / "other.pt", tmp_path / "folder" / "empty")
    unknown = told(tmp_path / "folder")
    assert (unknown["kind"], unknown["weights below"]) == ("unknown folder", ["empty/other.pt"])


def test_damaged_files(tiny_cascade: Path, tmp_path: Path, told: Inspect) -> None:
    whole = (tiny_cascade / "refiner" / "diffusion_pytorch_model.safetensors").read_bytes()
    torch.save({"x": torch.ones(1000)}, tmp_path / "whole.pt")
    expert = shutil.copytree(tiny_cascade / "experts" / "lfe", tmp_path / "lfe")
    (expert / "expert.json").write_text("{")
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name, content, why in (
        ("empty.safetensors", b"", "0 bytes"),
        ("cut.safetensors", whole[:5000], "cut short"),
        ("text.safetensors", b"no weights", "not a safetensors file"),
        ("cut.pt", (tmp_path / "whole.pt").read_bytes()[:900], "it ends early"),
        ("lfs.safetensors", lfs, "pointer of Git LFS: the file itself was not downloaded"),
    ):
        (tmp_path / name).write_bytes(content)
        found = told(tmp_path / name, code=2)
        assert why in next(value for key, value in found.items() if key != "kind")
    assert "expert.json: not JSON" in told(expert, code=2)["why"]
    (expert / "expert.json").write_text("{}")
    (expert / "adapter_config.json").unlink()
    assert told(expert, code=2)["why"] == f"{expert / 'adapter_config.json'}: No such file or directory"


def test_help_says_how_to_give_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--paths [PATH,...]  " in run_luve(capsys, "inspect", "--help").out.replace("\n", "  ")


@pytest.fixture(scope="module")
def originals(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VLUer, an expert, a transformer, a VAE, a text encoder, a LoRA and a checkpoint."""
    folder = tmp_path_factory.mktemp("originals")
    AdaptationTask(str(tiny_cascade / "wan"), lora_rank=2).export(folder, None)
    saved_checkpoint(ExpertTask(str(tiny_cascade / "wan"), LFE, "lfe"), folder / "last.ckpt")
    for part in ("vluer", "experts/lfe", "wan/text_encoder", "wan/vae"):
        shutil.copytree(tiny_cascade / part, folder / part)
    return folder


VALUES = st.sampled_from([None, -1, 0, 0.5, "x", "../..", [], [1, 2], {}, {"a": 1}, True, 1e30])


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_damage_is_told_in_one_line(originals: Path, tmp_path: Path, draw: st.DataObject) -> None:
    """Files cut short, with flipped bytes, swapped, or with other values in their JSON: never a bug's traceback."""
    names = sorted(str(path.relative_to(originals)) for path in originals.rglob("*") if path.is_file())
    name = draw.draw(st.sampled_from(names))
    content = bytearray((originals / name).read_bytes())
    how = draw.draw(st.sampled_from(["cut", "flip", "swap", "value"]))
    if how == "value" and name.endswith(".json"):
        settled = json.loads(content)
        settled[draw.draw(st.sampled_from(sorted(settled)))] = draw.draw(VALUES)
        content = bytearray(json.dumps(settled).encode())
    elif how == "flip":
        for place in draw.draw(st.lists(st.integers(0, min(len(content), 3000) - 1), min_size=1, max_size=9)):
            content[place] = draw.draw(st.integers(0, 255))
    elif how == "swap":
        content = bytearray((originals / draw.draw(st.sampled_from(names))).read_bytes())
    else:
        del content[draw.draw(st.integers(0, len(content) - 1)) :]
    folder = tmp_path / "files"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree((originals / name).parent, folder)
    changed = folder / Path(name).name
    changed.write_bytes(content)
    for path in (changed, changed.parent):
        words = ["inspect", str(path)]
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(words)
        assert code in (0, 2), err.getvalue()
        assert out.getvalue().startswith(str(path))
        assert len(err.getvalue().splitlines()) <= (1 if code == 2 else 0)


def test_several_paths_and_mistakes(tiny_cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> Outcome:
        return run_luve(capsys, "inspect", *words)

    (tmp_path / "a b.txt").write_text("x")
    (tmp_path / "empty.ckpt").touch()
    several = run(tmp_path / "a b.txt", tmp_path / "empty.ckpt", tiny_cascade / "vluer")
    assert [line.rpartition(": ")[2] for line in several.out.splitlines() if not line.startswith(" ") and line] == [
        "text file", "empty file", "VLUer"
    ]  # fmt: skip
    assert several.code == 2
    (line,) = several.error_lines
    assert line == f"luve inspect: error: {tmp_path / 'empty.ckpt'}: empty file: 0 bytes"
    missing = run(tmp_path / "a b.txt", tmp_path / "nothing")
    assert (missing.code, missing.out) == (2, "")
    assert missing.error_lines == [f"luve inspect: error: {tmp_path / 'nothing'}: no such file or folder"]
    names = ["${x}.txt", "a, b].txt", 'quo"te\\.txt', "null", "ümlaut: 1", "???"]
    for name in names:
        (tmp_path / name).write_text("x")
    assert [one["path"] for one in json.loads(run(*(tmp_path / name for name in names), "--json").out)] == [
        str(tmp_path / name) for name in names
    ]
    assert run().error_lines == ["luve inspect: error: paths: required, but not given"]
    assert "paths is given already" in run(tmp_path / "a b.txt", "--paths", "[x]").err
    assert "[PATHS]..." in run("--help").out


def test_an_attentions_parameters_belong_to_the_transformer(tiny_backbone: Path, tmp_path: Path, told: Inspect) -> None:
    AdaptationTask(str(tiny_backbone), attention=LearnedFrameAttention()).export(tmp_path, None)
    found = told(tmp_path / "transformer")
    assert found["attention"].startswith("LearnedFrameAttention")
    assert found["used"] == TRANSFORMER


def test_a_rivals_refiner_says_which_refinement_takes_it(tiny_cascade: Path, told: Inspect) -> None:
    for name in ("flashvideo", "lavie", "waver"):
        found = told(tiny_cascade / "rivals" / name)
        assert found["used"] == f"as --refiner, with --refinement {name}"
        assert found["sizes"].endswith("16 latent channels")
