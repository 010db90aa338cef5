"""The models of a cascade made from their configuration files alone, on any device, the meta device too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, ModelMixin, WanTransformer3DModel
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from luve_lightning.models.backbone import LatentCodec
from luve_lightning.models.folders import cannot_load, is_local
from luve_lightning.models.text import MAX_LENGTH
from luve_lightning.models.vluer import VLUer


@dataclass(frozen=True)
class PartConfigs:
    """What the configuration files of a backbone and a VLUer say.

    Attributes:
        transformer: of `WanTransformer3DModel`.
        vae: of `AutoencoderKLWan`.
        text_encoder: of `UMT5EncoderModel`.
        vluer: of `VLUer`; empty for the base size.
        refiner: of the transformer of the third stage; None when the first one's serves both.
        shift: of the scheduler.
        text_length: tokens of a prompt, padding included.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    vluer: dict[str, Any]
    refiner: dict[str, Any] | None = None
    shift: float = 5.0
    text_length: int = MAX_LENGTH

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        vluer: str | Path | None = None,
        refiner: str | Path | None = None,
        shift: float | None = None,
    ) -> PartConfigs:
        """Read them; no weights are looked for.

        Args:
            backbone: a pipeline folder, or a hub id whose configuration files can be had (from the cache, offline).
            vluer: folder of a saved VLUer; None takes the base size.
            refiner: another backbone, whose transformer refines; or a transformer's own folder.
            shift: of the schedule; None takes the backbone's.

        Raises:
            FileNotFoundError: when one of the files cannot be had.
            ValueError: for a shift that is not positive.
        """
        if shift is None:
            shift = float(_read(backbone, "scheduler", "scheduler_config.json").get("flow_shift") or 1.0)
        if not 0 < shift < float("inf"):
            raise ValueError(f"shift: expected a number greater than 0, got {shift}")
        own = None
        if refiner is not None:
            inside = is_local(refiner) and (Path(refiner) / "config.json").is_file()
            own = _read(refiner, "" if inside else "transformer", "config.json")
        upsampler: dict[str, Any] = {}
        if vluer is not None:
            if not (Path(vluer) / "config.json").is_file():
                raise FileNotFoundError(
                    f"vluer {vluer}: no config.json there; expected a folder saved by VLUer"
                )
            upsampler = _read(vluer, "", "config.json")
        return cls(
            transformer=_read(backbone, "transformer", "config.json"),
            vae=_read(backbone, "vae", "config.json"),
            text_encoder=_read(backbone, "text_encoder", "config.json"),
            vluer=upsampler,
            refiner=own,
            shift=shift,
            text_length=_text_length(backbone),
        )


def wan_1_3b() -> PartConfigs:
    """Wan2.1-T2V-1.3B and the base VLUer, for random weights of the real sizes."""
    return PartConfigs(
        transformer={
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "ffn_dim": 8960,
            "num_layers": 30,
            "text_dim": 4096,
            "freq_dim": 256,
        },
        vae={},
        text_encoder={
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        vluer={},
    )


class Parts:
    """The models of a cascade, each made when first asked for, in evaluation mode.

    Args:
        configs: what they are.
        dtype: of the transformers' and the text encoder's weights; what diffusers keeps in float32 stays so.
        device: where; "meta" needs no memory, elsewhere their weights are random.
        vae_dtype: of the VAE's and the VLUer's weights, float32 in `LuVePipeline` unless it is told otherwise.
    """

    def __init__(
        self,
        configs: PartConfigs,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.configs, self.dtype, self.device = configs, dtype, torch.device(device)
        self.vae_dtype = vae_dtype
        self._made: dict[str, Any] = {}

    @property
    def transformer(self) -> WanTransformer3DModel:
        """Of the first stage."""
        return self._part(
            "transformer", lambda: _from_config(WanTransformer3DModel, self.configs.transformer)
        )

    @property
    def refiner(self) -> WanTransformer3DModel:
        """Of the third stage; the first stage's unless it has its own."""
        config = self.configs.refiner
        if config is None:
            return self.transformer
        return self._part("refiner", lambda: _from_config(WanTransformer3DModel, config))

    @property
    def codec(self) -> LatentCodec:
        """The VAE."""
        return self._part(
            "vae", lambda: LatentCodec(_from_config(AutoencoderKLWan, self.configs.vae)), self.vae_dtype
        )

    @property
    def text_encoder(self) -> UMT5EncoderModel:
        """Captions' encoder."""
        return self._part("text_encoder", lambda: UMT5EncoderModel(UMT5Config(**self.configs.text_encoder)))

    @property
    def vluer(self) -> VLUer:
        """The latent upsampler."""
        return self._part("vluer", lambda: _from_config(VLUer, self.configs.vluer), self.vae_dtype)

    def names(self) -> list[str]:
        """Every part there is, whether made or not."""
        refiner = [] if self.configs.refiner is None else ["refiner"]
        return ["text_encoder", "transformer", *refiner, "vae", "vluer"]

    def module(self, name: str) -> nn.Module:
        """A part by its name in `names`."""
        part: nn.Module = self.codec if name == "vae" else getattr(self, name)
        return part

    def forget(self, *names: str) -> None:
        """Free parts."""
        for name in names:
            self._made.pop(name, None)

    def _part(self, name: str, make: Callable[[], Any], dtype: torch.dtype | None = None) -> Any:
        if name not in self._made:
            with self.device:
                part = make().eval().requires_grad_(False)
            cast_weights(part, dtype or self.dtype)
            self._made[name] = part
        return self._made[name]


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the dtype that `from_pretrained(torch_dtype=...)` gives them, in place.

    Buffers keep theirs, and so do the modules that diffusers keeps in float32 (transformers does so for float16 only).
    """
    keeps = isinstance(module, ModelMixin) or dtype == torch.float16
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if keeps else set()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _from_config(kind: Any, config: dict[str, Any]) -> Any:
    # Not from_config, which logs what it does not know.
    known = kind._get_init_keys(kind)
    return kind(**{key: value for key, value in config.items() if key in known})


def _read(backbone: str | Path, part: str, name: str) -> dict[str, Any]:
    """A JSON file of a folder, or of a hub id."""
    place = Path(backbone) / part / name
    if not is_local(backbone):
        try:
            place = Path(hf_hub_download(str(backbone), name, subfolder=part))
        except OSError as error:
            raise cannot_load(backbone, part, error) from error
    if not place.is_file():
        raise FileNotFoundError(
            f"backbone {backbone}: no {part}/{name} there; expected a diffusers pipeline folder"
        )
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{place}: expected a JSON object, got a {type(found).__name__}")
    return found


def _text_length(backbone: str | Path) -> int:
    """Tokens of a prompt: the tokenizer's, at most 512; 512 when it does not say."""
    try:
        config = _read(backbone, "tokenizer", "tokenizer_config.json")
    except FileNotFoundError:
        return MAX_LENGTH
    return min(int(config.get("model_max_length") or MAX_LENGTH), MAX_LENGTH)
