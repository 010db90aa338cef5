from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from luve_lightning.models.backbones.base import build

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}


def test_a_model_is_what_its_class_makes() -> None:
    torch.manual_seed(0)
    built = build("transformer", WanTransformer3DModel, WAN, text_dim=16)
    torch.manual_seed(0)
    direct = WanTransformer3DModel(**WAN, text_dim=16)
    assert built.config == direct.config
    assert all(
        torch.equal(a, b) for a, b in zip(built.state_dict().values(), direct.state_dict().values(), strict=True)
    )


def test_a_configuration_that_was_built_makes_its_model() -> None:
    config = build("text_encoder", UMT5Config, {"d_model": 16, "num_layers": 1, "d_ff": 16}, vocab_size=9)
    encoder = build("text_encoder", UMT5EncoderModel, {}, config=config)
    assert encoder.config.d_model == 16
    assert next(encoder.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"patch_size": [1, 2, 0]}, r"^transformer\.patch_size: expected 1 to 65536, got 0$"),
        ({"num_layers": 10**9}, r"^transformer\.num_layers: expected 1 to 65536, got 1000000000$"),
        ({"eps": float("nan")}, r"^transformer\.eps: expected a finite number, got nan$"),
        ({"no_such": 1}, r"^transformer: TypeError: .*no_such"),
        ({"patch_size": 5}, r"^transformer: "),
        ({"ffn_dim": 65_536, "num_attention_heads": 65_536}, r"^transformer: its .* weights would take at least"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build("transformer", WanTransformer3DModel, WAN | changes, text_dim=16)


def test_an_autoencoder_keeps_its_signed_statistics() -> None:
    sizes = {"base_dim": 4, "z_dim": 2, "num_res_blocks": 1, "latents_mean": [-1.0, 0.5], "latents_std": [1.0, 2.0]}
    assert build("vae", AutoencoderKLWan, sizes).config.latents_mean == [-1.0, 0.5]
