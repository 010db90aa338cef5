"""The ComfyUI nodes of comfyui/: on latents as ComfyUI passes them, raw, with stand-ins for ComfyUI's own modules."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from luve_lightning.data.mini_world.paint import draw_scene, paint_scene
from luve_lightning.functional.pixels import resize_video
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.vluer import load_vluer
from tests.helpers.comfyui import PACK, ComfyUI, Interrupted
from tests.helpers.released import small_released
from tests.helpers.upsampling import tiny_vluer

MINI = Path(__file__).resolve().parents[1] / "data/mini"
Upsample = Callable[..., dict[str, Any]]


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """ComfyUI with three VLUers: of Wan2.1's latents, of a VAE with other statistics, and of another width."""
    host = ComfyUI(tmp_path / "ComfyUI", monkeypatch)
    models = host.folder / "models/vluer"
    net = tiny_vluer(1)
    torch.nn.init.normal_(net.decoder.conv_out.weight, std=0.5)  # interpolation alone commutes with normalisation
    net.save_pretrained(models / "wan")
    tiny_vluer(2, 4).save_pretrained(models / "four")
    tiny_vluer(3, 4).save_pretrained(models / "four_with_vae")
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[1.0, -2.0, 0.5, 0.0], latents_std=[2.0, 0.5, 1.0, 3.0]
    )
    vae.save_config(models / "four_with_vae/vae")
    return host


@pytest.fixture
def nodes(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = comfy.install(monkeypatch).NODE_CLASS_MAPPINGS
    return found


@pytest.fixture
def upsample(nodes: dict[str, Any]) -> Upsample:
    """Runs a loader and an upsampling node as ComfyUI does: by the name of their function, in inference mode."""

    def run(samples: dict[str, Any], vluer: str, node: str = "LuVeUpsampleLatent", **inputs: Any) -> dict[str, Any]:
        with torch.inference_mode():
            (loaded,) = call(nodes["LuVeLoadVLUer"], vluer=vluer, dtype="float32")
            (out,) = call(nodes[node], samples=samples, vluer=loaded, **inputs)
        return out  # type: ignore[no-any-return]

    return run


def call(node: Any, **inputs: Any) -> tuple[Any, ...]:
    wanted = node.INPUT_TYPES()["required"]
    assert set(inputs) == set(wanted)
    out: tuple[Any, ...] = getattr(node(), node.FUNCTION)(**inputs)
    assert len(out) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return out


def statistics(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, std


def wan_statistics() -> tuple[Tensor, Tensor]:
    """Those of diffusers' defaults, which are Wan2.1's."""
    return statistics(dict(AutoencoderKLWan(base_dim=4, num_res_blocks=1).config))


def raw_latents(seed: int, *shape: int) -> Tensor:
    """Latents of Wan2.1's mean and spread."""
    mean, std = wan_statistics()
    return mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(folder: Path, raw: Tensor, size: tuple[int, int, int], mean: Tensor, std: Tensor) -> Tensor:
    out: Tensor = load_vluer(folder)((raw - mean) / std, size) * std + mean
    return out


@pytest.mark.slow
def test_raw_latents_of_a_clip_come_out_raw_and_better_than_interpolated(comfy: ComfyUI, upsample: Upsample) -> None:
    """With the mini world's own VLUer and VAE, on a photograph that neither was trained on."""
    folder = comfy.folder / "models/vluer/mini"
    shutil.copytree(MINI / "vluer", folder)
    (folder / "vae").mkdir()
    shutil.copy(MINI / "wan/vae/config.json", folder / "vae")
    frames = paint_scene(draw_scene(0, "test", 3, 5, 128, 16))
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    space = load_backbone(MINI / "wan").latent_space()
    with torch.no_grad():
        target = space.denormalize(space.encode(video))
        raw = space.denormalize(space.encode(resize_video(video, (64, 64))))
        without_statistics = load_vluer(folder)(raw, target.shape[2:])
    mean, std = statistics(json.loads((folder / "vae/config.json").read_text()))

    out = upsample({"samples": raw}, "mini", width=128, height=128)["samples"]

    assert torch.allclose(out, by_hand(folder, raw, (2, 16, 16), mean, std), atol=1e-4)
    interpolated = F.interpolate(raw, target.shape[2:], mode="trilinear")
    wrong_statistics = by_hand(folder, raw, (2, 16, 16), *wan_statistics())
    errors = {
        name: ((x - target) / std).abs().mean().item()
        for name, x in {
            "node": out,
            "interpolated": interpolated,
            "raw into the VLUer": without_statistics,
            "Wan2.1's statistics": wrong_statistics,
        }.items()
    }
    assert min(errors, key=lambda name: errors[name]) == "node", errors
    assert errors["node"] < 0.7 * errors["interpolated"], errors


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_denormalise_of_vluer_of_normalise(
    comfy: ComfyUI, upsample: Upsample, batch: int, dtype: torch.dtype
) -> None:
    raw = raw_latents(batch, batch, 16, 3, 5, 7).to(dtype)
    out = upsample({"samples": raw}, "wan", width=88, height=64)["samples"]
    wanted = by_hand(comfy.folder / "models/vluer/wan", raw.float(), (3, 8, 11), *wan_statistics())
    assert out.shape == (batch, 16, 3, 8, 11)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    with torch.no_grad():
        raw_in = load_vluer(comfy.folder / "models/vluer/wan")(raw.float(), (3, 8, 11))
    assert (raw_in - wanted).abs().mean() > 0.5


def test_statistics_come_from_the_folders_vae(comfy: ComfyUI, upsample: Upsample) -> None:
    folder = comfy.folder / "models/vluer/four_with_vae"
    mean, std = statistics({"latents_mean": [1.0, -2.0, 0.5, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0]})
    raw = mean + std * torch.randn(1, 4, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    out = upsample({"samples": raw}, "four_with_vae", width=112, height=80)["samples"]
    assert torch.allclose(out, by_hand(folder, raw, (2, 10, 14), mean, std), atol=1e-5)


def test_latents_of_an_image_are_a_video_of_one_frame(comfy: ComfyUI, upsample: Upsample) -> None:
    raw = raw_latents(0, 2, 16, 1, 5, 7)
    out = upsample({"samples": raw[:, :, 0]}, "wan", width=88, height=64)["samples"]
    assert out.shape == (2, 16, 8, 11)
    assert torch.equal(out, upsample({"samples": raw}, "wan", width=88, height=64)["samples"][:, :, 0])


@pytest.mark.parametrize(("factor", "size"), [(1.5, (9, 6)), (2.0, (12, 8)), (1.0, (6, 4)), (0.5, (3, 2))])
def test_a_factor_is_the_size_that_many_times(upsample: Upsample, factor: float, size: tuple[int, int]) -> None:
    raw = raw_latents(0, 1, 16, 2, 6, 4)
    out = upsample({"samples": raw}, "wan", "LuVeUpsampleLatentBy", factor=factor)["samples"]
    assert out.shape == (1, 16, 2, *size)
    width, height = 8 * size[1], 8 * size[0]
    assert torch.equal(out, upsample({"samples": raw}, "wan", width=width, height=height)["samples"])


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 1, 5, 7), (1, 40, 56), (1, 1, 2, 5, 7)])
def test_what_else_a_latent_holds_is_kept_and_its_mask_resized(upsample: Upsample, shape: tuple[int, ...]) -> None:
    raw = raw_latents(0, 2, 16, 2, 5, 7)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    given = {"samples": raw, "noise_mask": mask, "batch_index": [4, 7], "downscale_ratio_spacial": 8}
    out = upsample(dict(given), "wan", width=88, height=64)
    assert {key: out[key] for key in ("batch_index", "downscale_ratio_spacial")} == {
        "batch_index": [4, 7],
        "downscale_ratio_spacial": 8,
    }
    assert out["noise_mask"].shape == (*shape[:-2], 8, 11)
    assert torch.allclose(for_a_sampler(out["noise_mask"], (2, 8, 11)), for_a_sampler(mask, (2, 8, 11)), atol=1e-6)
    assert torch.equal(given["samples"], raw)  # the input is another node's output, too


def for_a_sampler(mask: Tensor, size: tuple[int, int, int]) -> Tensor:
    """A mask as ComfyUI's samplers resize it to a video's latents."""
    video = mask if mask.ndim == 5 else mask.reshape(1, 1, -1, *mask.shape[-2:])
    return F.interpolate(video, size, mode="trilinear")


class Nested:
    """ComfyUI's latents of several kinds in one, such as video and sound."""

    is_nested = True


@pytest.mark.parametrize(
    ("samples", "inputs", "message"),
    [
        (raw_latents(0, 1, 16, 2, 5, 7), {"width": 84, "height": 64}, "width 84: expected a multiple of 8, nearest"),
        (raw_latents(0, 1, 16, 2, 5, 7), {"width": 88, "height": 4}, "height 4: expected a multiple of 8"),
        (raw_latents(0, 1, 16, 2, 5, 7), {"factor": 1.5}, "height 40 would become 60, .* nearest are 56 and 64"),
        (raw_latents(0, 1, 16, 2, 6, 4), {"factor": 0.1}, "height 48 would become 4.8, .* nearest are 0 and 8"),
        (torch.zeros(1, 16, 2, 5, 7), {"factor": 2.0}, "latents are empty"),
        (torch.ones(1, 4, 2, 5, 7), {"factor": 2.0}, "latents have 4 channels, the VLUer wan takes 16"),
        (torch.ones(1, 16, 7), {"factor": 2.0}, r"got shape \(1, 16, 7\)"),
        (Nested(), {"factor": 2.0}, "several kinds in one"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_leaves_the_gpu(
    comfy: ComfyUI, upsample: Upsample, samples: Any, inputs: dict[str, Any], message: str
) -> None:
    node = "LuVeUpsampleLatentBy" if "factor" in inputs else "LuVeUpsampleLatent"
    with pytest.raises(ValueError, match=message):
        upsample({"samples": samples}, "wan", node, **inputs)
    assert comfy.calls == []


def test_memory_is_made_free_and_given_back(comfy: ComfyUI, upsample: Upsample) -> None:
    upsample({"samples": raw_latents(0, 3, 16, 2, 5, 7)}, "wan", width=88, height=64)
    assert comfy.calls == ["free_memory", *["interrupted?"] * 3, "soft_empty_cache"]
    assert comfy.progress == [(1, 3), (2, 3), (3, 3)]
    weights = sum(each.numel() * 4 for each in tiny_vluer().parameters())
    assert comfy.freed == [(weights + 2 * 8 * 11 * 2400, torch.device("cpu"))]


@pytest.mark.parametrize("moved", [("result",), ("weights",), ("run", "result", "weights")], ids="-".join)
def test_weights_and_results_go_where_comfyui_keeps_them(
    comfy: ComfyUI, nodes: dict[str, Any], moved: tuple[str, ...]
) -> None:
    """The meta device stands in for a GPU: it shows where tensors are, and holds none."""
    comfy.devices |= dict.fromkeys(moved, torch.device("meta"))
    (loaded,) = call(nodes["LuVeLoadVLUer"], vluer="wan", dtype="float32")
    samples = {"samples": raw_latents(0, 2, 16, 2, 5, 7)}
    (out,) = call(nodes["LuVeUpsampleLatentBy"], samples=samples, vluer=loaded, factor=2.0)
    assert out["samples"].shape == (2, 16, 2, 10, 14)
    assert out["samples"].device == comfy.devices["result"]
    kept = {each.device for each in (*loaded.net.parameters(), *loaded.space.buffers())}
    assert kept == {comfy.devices["weights"]}


def test_a_stopped_run_gives_its_memory_back(comfy: ComfyUI, upsample: Upsample) -> None:
    comfy.samples_before_stop = 1
    with pytest.raises(Interrupted):
        upsample({"samples": raw_latents(0, 3, 16, 2, 5, 7)}, "wan", width=88, height=64)
    assert comfy.calls[-1] == "soft_empty_cache"
    assert comfy.progress == [(1, 3)]


@pytest.mark.parametrize(
    ("dtype", "good_at_it", "wanted"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_weights_have_the_chosen_precision(
    comfy: ComfyUI, nodes: dict[str, Any], dtype: str, good_at_it: bool, wanted: torch.dtype
) -> None:
    comfy.bf16 = good_at_it
    (loaded,) = call(nodes["LuVeLoadVLUer"], vluer="wan", dtype=dtype)
    assert {each.dtype for each in loaded.net.parameters()} == {wanted}
    assert loaded.space.latents_mean.dtype == torch.float32
    raw = raw_latents(0, 1, 16, 2, 5, 7)
    (out,) = call(nodes["LuVeUpsampleLatentBy"], samples={"samples": raw}, vluer=loaded, factor=2.0)
    wanted_out = by_hand(comfy.folder / "models/vluer/wan", raw, (2, 10, 14), *wan_statistics())
    assert (out["samples"] - wanted_out).abs().max() < (0.2 if wanted == torch.bfloat16 else 1e-4)


def test_folders_of_vluers_are_listed_and_loaded_again_after_a_change(comfy: ComfyUI, nodes: dict[str, Any]) -> None:
    loader = nodes["LuVeLoadVLUer"]
    elsewhere = comfy.folder / "more"
    tiny_vluer(4).save_pretrained(elsewhere / "wan")  # the first of a name counts
    tiny_vluer(5).save_pretrained(elsewhere / "fifth")
    (elsewhere / "no_vluer").mkdir()
    comfy.paths["vluer"].append(str(elsewhere))
    (elsewhere / "linked").symlink_to(elsewhere / "fifth")
    names = ["four", "four_with_vae", "wan", "fifth", "linked"]
    assert loader.INPUT_TYPES()["required"]["vluer"][0] == names
    (loaded,) = call(loader, vluer="wan", dtype="float32")
    first = load_vluer(comfy.folder / "models/vluer/wan").state_dict()
    assert all(torch.equal(x, first[name]) for name, x in loaded.net.state_dict().items())

    before = {name: loader.IS_CHANGED(vluer=name, dtype="auto") for name in ("fifth", "linked")}
    assert before == {name: loader.IS_CHANGED(vluer=name, dtype="auto") for name in ("fifth", "linked")}
    tiny_vluer(6).save_pretrained(elsewhere / "fifth")
    for name, text in before.items():
        assert text != loader.IS_CHANGED(vluer=name, dtype="auto")
    with pytest.raises(
        FileNotFoundError, match=r"no VLUer sixth in .*; there are four, four_with_vae, wan, fifth, linked"
    ):
        call(loader, vluer="sixth", dtype="float32")


def test_a_vluer_of_another_width_needs_its_vaes_configuration(comfy: ComfyUI, nodes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"takes 4 latent channels, Wan2.1's have 16; copy the configuration"):
        call(nodes["LuVeLoadVLUer"], vluer="four", dtype="float32")
    folder = comfy.folder / "models/vluer"
    shutil.copytree(folder / "four_with_vae/vae", folder / "wan/vae")
    with pytest.raises(ValueError, match=r"takes 16 latent channels, its vae/config.json has 4"):
        call(nodes["LuVeLoadVLUer"], vluer="wan", dtype="float32")


@pytest.mark.slow
def test_the_released_vluer_runs_and_says_what_it_cannot_take(comfy: ComfyUI, upsample: Upsample) -> None:
    small_released().save_pretrained(comfy.folder / "models/vluer/released")
    raw = raw_latents(0, 1, 16, 2, 64, 64)
    out = upsample({"samples": raw}, "released", width=704, height=768)["samples"]
    wanted = by_hand(comfy.folder / "models/vluer/released", raw, (2, 96, 88), *wan_statistics())
    assert torch.allclose(out, wanted, atol=1e-4)
    comfy.calls.clear()
    with pytest.raises(ValueError, match="at least 2 latent frames of 64 x 64, got 1 of 64 x 64"):
        upsample({"samples": raw[:, :, 0]}, "released", "LuVeUpsampleLatentBy", factor=1.5)
    assert comfy.calls == []


def test_the_workflow_names_nodes_and_inputs_that_exist(nodes: dict[str, Any]) -> None:
    """API format: nodes by their number, inputs as values or as [number, output]."""
    workflow: dict[str, Any] = json.loads((PACK / "workflow.json").read_text())
    # ComfyUI's own: inputs that must be given, and the types of what comes out.
    core: dict[str, tuple[set[str], tuple[str, ...]]] = {
        "UNETLoader": ({"unet_name", "weight_dtype"}, ("MODEL",)),
        "ModelSamplingSD3": ({"model", "shift"}, ("MODEL",)),
        "CLIPLoader": ({"clip_name", "type"}, ("CLIP",)),
        "VAELoader": ({"vae_name"}, ("VAE",)),
        "CLIPTextEncode": ({"clip", "text"}, ("CONDITIONING",)),
        "EmptyHunyuanLatentVideo": ({"width", "height", "length", "batch_size"}, ("LATENT",)),
        "VAEDecodeTiled": (
            {"samples", "vae", "tile_size", "overlap", "temporal_size", "temporal_overlap"},
            ("IMAGE",),
        ),
        "SaveWEBM": ({"images", "filename_prefix", "codec", "fps", "crf"}, ()),
        "KSamplerAdvanced": (
            {"model", "add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
             "latent_image", "start_at_step", "end_at_step", "return_with_leftover_noise"},
            ("LATENT",),
        ),
    }  # fmt: skip
    takes = {
        "model": "MODEL", "clip": "CLIP", "vae": "VAE", "samples": "LATENT", "latent_image": "LATENT",
        "positive": "CONDITIONING", "negative": "CONDITIONING", "images": "IMAGE",
    }  # fmt: skip
    ours = set()
    for number, node in workflow.items():
        kind = node["class_type"]
        if kind in nodes:
            required = nodes[kind].INPUT_TYPES()["required"]
            ours.add(kind)
        else:
            required = {name: (takes.get(name),) for name in core[kind][0]}
        assert set(node["inputs"]) == set(required), number
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = workflow[value[0]]["class_type"]
                gives = nodes[source].RETURN_TYPES if source in nodes else core[source][1]
                assert gives[value[1]] == required[name][0], (number, name)
            elif kind in nodes and "min" in required[name][-1]:
                assert required[name][1]["min"] <= value <= required[name][1]["max"]
    assert ours == {"LuVeLoadVLUer", "LuVeUpsampleLatent"}


def test_every_node_is_named_in_the_readme_with_its_inputs(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = comfy.install(monkeypatch)
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    rows = re.findall(r"^\| (LuVe [^|]+) \| ([^|]+) \|", (PACK / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {title: set(re.findall(r"`(\w+)`", inputs)) for title, inputs in rows}
    assert shown == {
        title: set(module.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"])
        for name, title in module.NODE_DISPLAY_NAME_MAPPINGS.items()
    }
