"""Wan2.1's diffusion transformer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, _get_qkv_projections
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import TaggedRotary
from luve_lightning.models.backbones.denoiser import Denoiser

_ROTARY_BASE = 10_000.0  # of the rotary frequencies; no configuration has it

# Names in Wan's own code, and so in ComfyUI, DiffSynth-Studio and kohya's trainers, where diffusers' differ.
_ORIGINAL = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_(q|k|v)$", r"_attn.\1"),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.add_(k|v)_proj$", r"_attn.\1_img"),
    (r"_attn\.norm_added_k$", "_attn.norm_k_img"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj$", r"\1.ffn.0"),
    (r"^(blocks\.\d+)\.ffn\.net\.2$", r"\1.ffn.2"),
    (r"^proj_out$", "head.head"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
)


class WanDenoiser(Denoiser):
    """Wan2.1's transformer: blocks of self-attention, cross-attention and a feed-forward; see Denoiser."""

    module_class = WanTransformer3DModel
    sites = {"attention": "attn1", "cross_attention": "attn2", "feed_forward": "ffn"}  # noqa: RUF012
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    modulation = "modulation"
    # diffusers' own patterns ("blocks.*attn", matched in full) name no module of Wan, so its cache would do
    # nothing.
    cached = (r"blocks\.\d+\.(attn1|attn2|ffn)",)

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        for _, block in self.blocks:
            for part in block.modules():
                if type(part) is nn.RMSNorm:
                    part.__class__ = _RMSNorm  # the same weights, names and hooks
        if self.conditioned:
            self.module.patch_embedding.__class__ = _TwoInputs

    @property
    def channels(self) -> int:
        """See Denoiser."""
        config = self.module.config
        if config.in_channels != config.out_channels and not self.conditioned:
            raise ValueError(
                f"the transformer takes {config.in_channels} latent channels and gives {config.out_channels}"
            )
        return int(config.out_channels)

    @property
    def conditioned(self) -> bool:
        """Whether it takes twice the channels that it gives."""
        return bool(self.module.config.in_channels == 2 * self.module.config.out_channels)

    def take_condition(self) -> None:
        """See Denoiser."""
        if self.conditioned:
            return
        channels, narrow = self.channels, self.module.patch_embedding
        wide: Any = _TwoInputs(
            2 * channels, narrow.out_channels, narrow.kernel_size, narrow.stride,
            device=narrow.weight.device, dtype=narrow.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, :channels] = narrow.weight
            wide.bias.copy_(narrow.bias)
        self.module.patch_embedding = wide.requires_grad_(narrow.weight.requires_grad)
        self.module.register_to_config(in_channels=2 * channels)

    @property
    def embedding_parameters(self) -> Sequence[nn.Parameter]:
        """See Denoiser."""
        return list(self.module.patch_embedding.parameters())

    @property
    def text_dim(self) -> int:
        """Width of its text embeddings."""
        return int(self.module.config.text_dim)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return int(self.module.config.num_attention_heads)

    @property
    def patch(self) -> Size3d:
        """Latent frames, rows and columns of one token."""
        t, h, w = self.module.config.patch_size
        return t, h, w

    @property
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Blocks in order of execution, with their names in the module."""
        return [(f"blocks.{index}", block) for index, block in enumerate(self.module.blocks)]

    @staticmethod
    def widths(site: Any) -> tuple[int, int]:
        """Input and output channels of an attention or feed-forward module."""
        if isinstance(site, WanAttention):
            return site.to_q.in_features, site.to_out[0].out_features
        return site.net[0].proj.in_features, site.net[-1].out_features

    def predict(self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        """See Denoiser."""
        velocity: Tensor = self.module(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False, **options
        )[0]
        return velocity

    @property
    def rotary(self) -> nn.Module:
        """The submodule that makes each pass's rotary embedding."""
        rope: nn.Module = self.module.rope
        return rope

    @staticmethod
    def tokens_of(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Grid]:
        """The latents passed to `rotary`, and their token grid."""
        del kwargs
        (latents,) = args
        t, h, w = (n // p for n, p in zip(latents.shape[2:], rotary.patch_size, strict=True))
        return latents, (t, h, w)

    @property
    def rotary_channels(self) -> Grid:
        """See Denoiser."""
        rope = self.module.rope
        return rope.t_dim, rope.h_dim, rope.w_dim

    @contextmanager
    def scaled_rotary(self, height: float = 1.0, width: float = 1.0, temperature: float = 1.0) -> Iterator[None]:
        """See Denoiser."""
        rope = self.module.rope
        for name, factor in (("height", height), ("width", width), ("temperature", temperature)):
            if not 0 < factor < math.inf:
                raise ValueError(f"{name}: expected a factor greater than 0, got {factor}")
        before = {name: getattr(rope, name) for name in ("freqs_cos", "freqs_sin")}
        axes = zip(self.rotary_channels, (1.0, height, width), strict=True)
        made = [_rotary(channels, rope.max_seq_len, _ROTARY_BASE * factor) for channels, factor in axes]
        for name, parts in zip(before, zip(*made, strict=True), strict=True):
            values = torch.cat(parts, dim=1) * math.sqrt(temperature)
            setattr(rope, name, values.to(before[name]))
        try:
            yield
        finally:
            for name, values in before.items():
                setattr(rope, name, values.to(getattr(rope, name).device))  # offloading may have moved it

    def set_attention(self, attend: Callable[..., Tensor] | None) -> None:
        """Replace what self-attention computes; see Denoiser."""
        self.tag_passes()
        for layer, (_, site) in enumerate(self.attention_sites):
            attention: Any = site
            attention.set_processor(WanAttnProcessor() if attend is None else _Attending(attend, layer))

    @staticmethod
    def original_name(name: str) -> str:
        """A module's or parameter's name in Wan's own code."""
        for ours, theirs in _ORIGINAL:
            name = re.sub(ours, theirs, name)
        return name


class _Attending:
    """Wan's self-attention with another function inside."""

    def __init__(self, attend: Callable[..., Tensor], layer: int) -> None:
        self.attend, self.layer = attend, layer

    def __call__(
        self,
        attention: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: TaggedRotary,
    ) -> Tensor:
        del attention_mask
        query, key, value = _get_qkv_projections(attention, hidden_states, encoder_hidden_states)
        query, key, value = (
            x.unflatten(2, (attention.heads, -1)) for x in (attention.norm_q(query), attention.norm_k(key), value)
        )
        query, key = (_rotated(x, *rotary_emb).type_as(value) for x in (query, key))
        output = self._attended(attention, query, key, value, rotary_emb).flatten(2, 3)
        for layer in attention.to_out:
            output = layer(output)
        return output

    # Never part of a compiled graph: a graph of it would hold for one layer, grid and noise level alone, and what
    # training keeps of attention is known by its operators.
    @torch.compiler.disable
    def _attended(
        self, attention: WanAttention, query: Tensor, key: Tensor, value: Tensor, rotary: TaggedRotary
    ) -> Tensor:
        branch = getattr(attention, "branch", None)
        return self.attend(query, key, value, rotary.where(self.layer), branch).type_as(value)


class _TwoInputs(nn.Conv3d):
    """A convolution of two inputs that stand one after the other along the channels, each on its own.

    Zero weights for the second leave the output of the first as it is, to the bit. One sum over all channels need not:
    the order in which a kernel adds may depend on their number.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = self.in_channels // 2
        own = self._conv_forward(x[:, :half], self.weight[:, :half], self.bias)
        return own + self._conv_forward(x[:, half:], self.weight[:, half:], None)


class _RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input.

    PyTorch's own, given bfloat16 tokens and a float32 weight, as under autocast, leaves its fused kernel with a warning
    and keeps float32 copies for the backward pass. Where the dtypes are the same, so are the two.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return rms_norm(x, list(self.normalized_shape), weight, self.eps)


def _rotary(channels: int, positions: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of an axis as the family makes them, positions x channels, float32."""
    cos, sin = get_1d_rotary_pos_embed(
        channels, positions, base, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
    )
    return cos, sin


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys rotated by their positions, as in WanAttnProcessor."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).type_as(x)
