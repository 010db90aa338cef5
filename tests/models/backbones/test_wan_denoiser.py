"""Loading, saving, the token grid and the attention of Wan's transformer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from luve_lightning.models.attention import Where
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from luve_lightning.models.experts import add_expert
from tests.helpers.attending import FrameAttention, LearnedFrameAttention
from tests.helpers.tiny_wan import LFE, flow_scheduler, inputs, load_transformer, output, tiny_transformer

TINY = tiny_transformer()


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9))
def test_a_grid_is_whole_or_refused(frames: int, height: int, width: int) -> None:
    """What passes comes out of the transformer as large as it went in; what it would crop does not pass."""
    size = (frames, height, width)
    if height % 2 or width % 2:
        name, n = ("height", height) if height % 2 else ("width", width)
        low = max(2, n - 1)
        message = f"latent {name} {n}: the transformer takes multiples of 2, nearest are {low} and {low + 2}"
        with pytest.raises(ValueError, match=message):
            WanDenoiser(TINY).token_grid(size)
        return
    assert WanDenoiser(TINY).token_grid(size) == (frames, height // 2, width // 2)
    with torch.no_grad():
        assert output(TINY, inputs(1, size)).shape == (1, 4, *size)


@pytest.mark.parametrize("folder", ["transformer", "."])
def test_saved_weights_load_from_either_folder(tmp_path: Path, folder: str) -> None:
    net = tiny_transformer()
    expected = {k: v.to(torch.bfloat16).float() for k, v in net.state_dict().items()}
    WanDenoiser(net).save(tmp_path / folder, torch.bfloat16)
    loaded = load_transformer(tmp_path)
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    half = load_transformer(tmp_path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.blocks[0].scale_shift_table.dtype == torch.float32, "diffusers keeps it so"


def test_the_scheduler_is_the_pipelines(tmp_path: Path) -> None:
    flow_scheduler(3.0).save_pretrained(tmp_path)
    again = flow_scheduler(5.0).from_pretrained(tmp_path)
    again.set_timesteps(10)
    s = 1 - 3 / 10 * 0.999  # the fourth of ten, evenly spaced from 1 to 1/1000
    assert again.sigmas[3].item() == pytest.approx(3 * s / (1 + 2 * s), rel=1e-5)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    def message(backbone: object) -> str:
        with pytest.raises(FileNotFoundError) as error:
            load_transformer(str(backbone))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(tmp_path).startswith(
        f"backbone {tmp_path}: no model_index.json there, nor transformer/config.json; "
    )
    assert message("runs/mini/adaptation/export") == (
        "backbone runs/mini/adaptation/export: no such folder; expected a diffusers pipeline folder or a hub id"
    )
    assert message("nobody/nothing").startswith(
        "backbone nobody/nothing: no such folder, and its model_index.json is not available from the hub: "
    )
    WanDenoiser(tiny_transformer()).save(tmp_path, torch.float32)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert message(tmp_path).startswith(f"{tmp_path}: cannot be loaded: ")


@torch.no_grad()
def test_an_attention_is_saved_with_the_transformer(tmp_path: Path) -> None:
    """It acts in what is loaded, copied or given an expert, and is refused where it is not known."""
    plain = tiny_transformer()
    denoiser = WanDenoiser(tiny_transformer())
    denoiser.use_attention(FrameAttention(2))  # both frames: all tokens
    torch.testing.assert_close(output(denoiser.module, inputs()), output(plain, inputs()))
    denoiser.use_attention(FrameAttention())
    want = output(denoiser.module, inputs())
    assert not torch.allclose(want, output(plain, inputs()), atol=1e-4)

    denoiser.save(tmp_path, torch.float32)
    loaded = load_transformer(tmp_path)
    assert torch.equal(output(loaded, inputs()), want)
    add_expert(loaded, "lfe", LFE)
    assert torch.equal(output(loaded, inputs()), want)
    other = denoiser.copy()
    other.module.load_state_dict(denoiser.module.state_dict())
    assert torch.equal(output(other.module.eval(), inputs()), want)

    denoiser.use_attention(None)
    assert torch.equal(output(denoiser.module, inputs()), output(plain, inputs()))
    config = json.loads((tmp_path / "config.json").read_text())
    for record, message in (
        ({"name": "Unknown"}, "attention 'Unknown': expected one of .*FrameAttention"),
        ({"name": "FrameAttention", "rows": 3}, "attention FrameAttention: .*'rows'"),
        ({"name": "Windows"}, "attention Windows: needs 'cuts'"),
        ("Windows", rf"{tmp_path}: config.json: luve_attention: .*expected a name and settings, got 'Windows'"),
        ([1], r"expected a name and settings, got \[1\]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"luve_attention": record}))
        with pytest.raises(ValueError, match=message):
            load_transformer(tmp_path)


@torch.no_grad()
def test_self_attention_can_be_replaced_and_put_back() -> None:
    """By the same arithmetic nothing changes, by another one it does; text is attended to as before."""
    transformer = tiny_transformer()
    denoiser, want, wheres = WanDenoiser(transformer), output(transformer, inputs()), []

    def plain(query: Tensor, key: Tensor, value: Tensor, where: Where, branch: None) -> Tensor:
        assert branch is None
        wheres.append(where)
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    denoiser.set_attention(plain)
    torch.testing.assert_close(output(transformer, inputs()), want)
    assert wheres == [Where((2, 6, 5), 0), Where((2, 6, 5), 1)]
    denoiser.set_attention(lambda query, key, value, where, branch: value)
    assert not torch.allclose(output(transformer, inputs()), want, atol=1e-3)
    denoiser.set_attention(None)
    assert torch.equal(output(transformer, inputs()), want)


@torch.no_grad()
def test_parameters_of_an_attention_are_saved_beside_the_transformer(tmp_path: Path) -> None:
    """They change nothing at first, are copied and loaded, and are refused where they do not fit."""
    denoiser = WanDenoiser(tiny_transformer())
    denoiser.use_attention(FrameAttention())
    want = output(denoiser.module, inputs())
    denoiser.use_attention(LearnedFrameAttention())
    assert torch.equal(output(denoiser.module, inputs()), want)
    assert list(denoiser.branches) == ["blocks.0.attn1.branch", "blocks.1.attn1.branch"]
    for branch in denoiser.branches.values():
        torch.nn.init.normal_(branch.weight)
    want = output(denoiser.module, inputs())

    denoiser.save(tmp_path, torch.float32)
    assert torch.equal(output(denoiser.module, inputs()), want)  # saving takes nothing away
    loaded = load_transformer(tmp_path)
    assert torch.equal(output(loaded, inputs()), want)
    add_expert(loaded, "lfe", LFE)
    assert list(WanDenoiser(loaded).branches) == list(denoiser.branches)
    assert torch.equal(output(loaded, inputs()), want)
    other = denoiser.copy()
    other.module.load_state_dict(denoiser.module.state_dict())
    assert torch.equal(output(other.module.eval(), inputs()), want)

    weights = tmp_path / "attention.safetensors"
    save_file({"blocks.0.attn1.branch.weight": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match="does not fit the attention"):
        load_transformer(tmp_path)
    weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_transformer(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="missing; the transformer's attention has parameters"):
        load_transformer(tmp_path)


@torch.no_grad()
def test_an_attention_learns_each_samples_noise_level() -> None:
    """Only where it asks for it; other passes are not told."""
    seen = []

    class Seeing(FrameAttention):
        needs_sigma = True

        def __call__(self, *args: Any, **options: Any) -> Tensor:
            seen.append(args[3].sigmas)
            return super().__call__(*args, **options)

    denoiser = WanDenoiser(tiny_transformer())
    denoiser.use_attention(Seeing())
    latents, text = torch.randn(3, denoiser.channels, 2, 4, 4), torch.randn(3, 5, denoiser.text_dim)
    denoiser.velocity(latents, torch.tensor([1000.0, 875.0, 250.0]), text)
    assert seen == [(1.0, 0.875, 0.25)] * 2


def test_the_original_names_are_those_that_diffusers_converts() -> None:
    """Of every parameter of an image-to-video transformer, which has all modules that Wan2.1 has."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}
    image = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24}
    with torch.device("meta"):
        ours = list(WanTransformer3DModel(**sizes, **image, cross_attn_norm=True).state_dict())
    original = {}
    for number, name in enumerate(ours):
        module, _, leaf = name.rpartition(".")
        parts = (module, f".{leaf}") if leaf in ("weight", "bias") else (name, "")
        original[WanDenoiser.original_name(parts[0]) + parts[1]] = torch.tensor(number)
    assert len(original) == len(ours)
    converted = convert_wan_transformer_to_diffusers(original)
    assert {name: int(number) for name, number in converted.items()} == {name: n for n, name in enumerate(ours)}


def test_norms_of_float32_weights_stay_in_their_fused_kernel_under_autocast() -> None:
    """Within bfloat16's rounding of PyTorch's own, which leaves it with a warning; in float32 the same to the bit."""
    plain, denoiser = tiny_transformer(), WanDenoiser(tiny_transformer())
    norms = [module for module in denoiser.module.modules() if isinstance(module, nn.RMSNorm)]
    assert norms
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.5, generator=torch.Generator().manual_seed(0))
    plain.load_state_dict(denoiser.module.state_dict())
    assert torch.equal(output(denoiser.module, inputs()), output(plain, inputs()))

    def values(transformer: Any, autocast: bool) -> list[Tensor]:
        """Velocity and all gradients."""
        transformer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = output(transformer, inputs()).float()
        found.square().mean().backward()
        gradients = [p.grad.flatten() for p in transformer.parameters() if p.grad is not None]
        return [found.detach(), torch.cat(gradients)]

    def leaves_it(transformer: Any) -> tuple[list[Tensor], bool]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = values(transformer, autocast=True)
        return found, any("Cannot dispatch to fused" in str(warning.message) for warning in told)

    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        (theirs, they_leave), (ours, we_leave) = leaves_it(plain), leaves_it(denoiser.module)
    finally:
        torch.set_warn_always(always)
    assert (they_leave, we_leave) == (True, False)
    for own, other, exact in zip(ours, theirs, values(plain, autocast=False), strict=True):
        assert 0 < (own - exact).norm() < 1.25 * (other - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [(2, 12), (12, 128)], ids=["tiny", "as wide as Wan2.1"])
def test_a_new_condition_changes_nothing_to_the_bit(
    tmp_path: Path, dtype: torch.dtype, batch: int, heads: tuple[int, int]
) -> None:
    """Whatever it is; it counts once its weights do, also after saving and loading."""
    sizes = {"num_attention_heads": heads[0], "attention_head_dim": heads[1], "in_channels": 16, "out_channels": 16}
    WanDenoiser(tiny_transformer(num_layers=1, **sizes)).save(tmp_path / "narrow", dtype)
    narrow, wide = (load_backbone(tmp_path / "narrow").denoiser(dtype) for _ in range(2))
    wide.take_condition()
    wide.take_condition()  # a second time does nothing
    assert (narrow.channels, wide.channels, narrow.conditioned, wide.conditioned) == (16, 16, False, True)
    assert wide.module.config.in_channels == 32
    draw = torch.Generator().manual_seed(0)
    latents, other = torch.randn(2, batch, 16, 2, 4, 6, generator=draw).to(dtype)
    given = torch.linspace(900, 10, batch), torch.randn(batch, 3, 8, generator=draw).to(dtype)
    with torch.no_grad():
        assert torch.equal(wide.velocity(latents, *given, condition=other), narrow.velocity(latents, *given))
        wide.module.patch_embedding.weight[:, 16:].normal_(generator=draw)
        changed = wide.velocity(latents, *given, condition=other)
        assert not torch.allclose(changed, narrow.velocity(latents, *given), atol=0.1)
        wide.save(tmp_path / "wide", dtype)
        loaded = load_backbone(tmp_path / "wide").denoiser(dtype)
        assert torch.equal(loaded.velocity(latents, *given, condition=other), changed)
        copied = loaded.copy()
        copied.module.load_state_dict(loaded.module.state_dict())
        assert (
            copied.velocity(latents.float(), given[0], given[1].float(), condition=other.float()).shape == latents.shape
        )


def test_a_condition_is_given_where_one_is_taken() -> None:
    narrow, wide = WanDenoiser(tiny_transformer()), WanDenoiser(tiny_transformer())
    wide.take_condition()
    given = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="takes no other latents beside its own, got some"):
        narrow.velocity(*given, condition=given[0])
    with pytest.raises(ValueError, match="takes other latents beside its own, got none"):
        wide.velocity(*given)
    with pytest.raises(ValueError, match="takes 36 latent channels and gives 16"):
        _ = WanDenoiser(tiny_transformer(in_channels=36, out_channels=16)).channels
