"""A second family of backbones, as another package would bring it: nothing of Wan's, and nothing in common with it.

Ribbon's transformer takes packed tokens, B x N x C, with the grid beside them; its blocks and their modules have other
names. Its VAE halves time and quarters space, into six channels; its text encoder is a table of words.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from luve_lightning.functional.frequency import Grid
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.functional.pixels import video_to_frames
from luve_lightning.model_folders import load_whole, saving
from luve_lightning.models.attention import load_branches
from luve_lightning.models.backbones import (
    Backbone,
    CutText,
    Denoiser,
    LatentSpace,
    Schedule,
    SizeRules,
    TextConditioner,
)
from luve_lightning.models.backbones.base import build

TIME, SPACE = 2, 4
FOLDED = 3 * TIME * SPACE**2


class RibbonVAE(ModelMixin, ConfigMixin):
    """Pixels folded into channels and mixed there; the first frame is repeated, so that 2k + 1 frames fold."""

    @register_to_config
    def __init__(
        self,
        channels: int = 6,
        hidden: int = 16,
        means: Sequence[float] | None = None,
        deviations: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv3d(FOLDED, hidden, 1), nn.GELU(), nn.Conv3d(hidden, 2 * channels, 1))
        self.spread = nn.Sequential(nn.Conv3d(channels, hidden, 1), nn.GELU(), nn.Conv3d(hidden, FOLDED, 1))

    def moments(self, video: Tensor) -> Tensor:
        x = torch.cat([video[:, :, :1], video], 2)
        x = x.unflatten(2, (-1, TIME)).unflatten(4, (-1, SPACE)).unflatten(6, (-1, SPACE))
        return self.squeeze(x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4))

    def pixels(self, latents: Tensor) -> Tensor:
        x = self.spread(latents).unflatten(1, (3, TIME, SPACE, SPACE))
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, 1:]


class RibbonLatents(LatentSpace):
    def __init__(self, vae: RibbonVAE, tile: tuple[int, int] | None = None) -> None:
        count = vae.config.channels
        super().__init__(
            vae, tile, vae.config.means or [0.0] * count, vae.config.deviations or [1.0] * count, SPACE, TIME
        )

    def clips_at_once(self, frames: int, height: int, width: int) -> int:
        return 64

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        self.latent_size(*video.shape[2:])
        return self.normalize(self.moments(self.vae, video.to(self.latents_mean)).chunk(2, 1)[0].float())

    @torch.no_grad()
    def decode(self, latents: Tensor, *, out: Tensor | None = None) -> Tensor:
        video = self.decode_differentiable(latents).float().clamp(-1, 1)
        if out is None:
            return video
        return out.copy_(video_to_frames(video) if out.dtype == torch.uint8 else video)

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        return self.pixels(self.vae, self.denormalize(latents.float()).to(self.dtype))

    def fingerprint(self) -> str:
        facts = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for weight in self.vae.parameters():
            digest.update(weight.detach().float().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def moments(vae: Any, video: Tensor) -> Tensor:
        return vae.moments(video)

    @staticmethod
    def pixels(vae: Any, latents: Tensor) -> Tensor:
        return vae.pixels(latents)

    @staticmethod
    def set_statistics(vae: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        vae.register_to_config(means=list(mean), deviations=list(std))


class RibbonWords(ModelMixin, ConfigMixin):
    """A table of words."""

    @register_to_config
    def __init__(self, words: int, width: int = 10) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)


class RibbonText(TextConditioner):
    @staticmethod
    def own_length(tokenizer: Any) -> int:
        return int(tokenizer.model_max_length)

    @staticmethod
    def states(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return encoder.table(ids)

    @property
    def dim(self) -> int:
        return int(self.encoder.config.width)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    def cut(self, text: str) -> CutText | None:
        words = text.split()
        if len(words) <= self.length:
            return None
        return CutText(len(words), self.length, " ".join(words[self.length :]))

    def vocabulary(self) -> Mapping[str, int]:
        return self.tokenizer.get_vocab()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.vocabulary(), sort_keys=True).encode())
        digest.update(self.encoder.table.weight.detach().float().numpy().tobytes())
        return digest.hexdigest()


class Angles(nn.Module):
    """Turns queries and keys by their places along t, h and w."""

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        places = torch.cartesian_prod(*(torch.arange(n, device=tokens.device) for n in grid)).view(-1, 3)
        turns = places.to(tokens.dtype) / torch.tensor([1.0, 3.0, 9.0]).to(tokens)
        return turns.cos()[:, None], turns.sin()[:, None]


class Attend(nn.Module):
    """Attention of tokens to some others, with the function in its middle in an attribute."""

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.heads, self.middle, self.layer = heads, None, 0
        self.ask, self.offer = nn.Linear(width, width), nn.Linear(other, 2 * width)
        self.give = nn.Linear(width, width)

    def forward(self, x: Tensor, others: Tensor, angles: Any = None) -> Tensor:
        query = self.ask(x).unflatten(2, (self.heads, -1))
        key, value = self.offer(others).unflatten(2, (2, self.heads, -1)).unbind(2)
        if angles is not None:
            query, key = _turned(query, *angles), _turned(key, *angles)
        if self.middle is not None:
            return self.give(
                self.middle(query, key, value, angles.where(self.layer), getattr(self, "branch", None)).flatten(2)
            )
        taken = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
        return self.give(taken.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :6], x[..., 6:]
    first, second = turned.unflatten(-1, (3, 2)).unbind(-1)
    both = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((both.flatten(-2), rest), -1)


class Think(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x)))


class RibbonLayer(nn.Module):
    def __init__(self, width: int, text: int, heads: int) -> None:
        super().__init__()
        self.look, self.read, self.think = (Attend(width, width, heads), Attend(width, text, heads), Think(width))

    def forward(self, x: Tensor, text: Tensor, angles: tuple[Tensor, Tensor], level: Tensor) -> Tensor:
        calm = F.layer_norm(x + level, x.shape[-1:])
        x = x + self.look(calm, calm, angles)
        x = x + self.read(F.layer_norm(x, x.shape[-1:]), text)
        return x + self.think(F.layer_norm(x, x.shape[-1:]))


class RibbonTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """Velocities of packed tokens."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("RibbonLayer",)

    @register_to_config
    def __init__(self, channels: int = 6, width: int = 16, heads: int = 2, layers: int = 2, text: int = 10) -> None:
        super().__init__()
        self.enter, self.level, self.leave = (
            nn.Linear(channels, width),
            nn.Linear(1, width),
            nn.Linear(width, channels),
        )
        self.angles = Angles()
        self.ribbon = nn.ModuleList(RibbonLayer(width, text, heads) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(self, tokens: Tensor, time: Tensor, words: Tensor, grid: Grid) -> Tensor:
        angles, level = self.angles(tokens, grid), self.level(time.to(tokens)[:, None, None] / 1000)
        x = self.enter(tokens)
        for layer in self.ribbon:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x, words, angles, level)
            else:
                x = layer(x, words, angles, level)
        return self.leave(x)


class RibbonDenoiser(Denoiser):
    module_class = RibbonTransformer
    sites = {"attention": "look", "cross_attention": "read", "feed_forward": "think"}  # noqa: RUF012
    lora_targets = ("ask", "offer", "give", "widen", "narrow")
    cached = (r"ribbon\.\d+\.(look|read|think)",)

    @property
    def channels(self) -> int:
        return int(self.module.config.channels)

    @property
    def text_dim(self) -> int:
        return int(self.module.config.text)

    @property
    def heads(self) -> int:
        return int(self.module.config.heads)

    @property
    def patch(self) -> Size3d:
        return 1, 1, 1

    @property
    def blocks(self) -> Sequence[tuple[str, nn.Module]]:
        return [(f"ribbon.{index}", layer) for index, layer in enumerate(self.module.ribbon)]

    @staticmethod
    def widths(site: Any) -> tuple[int, int]:
        if isinstance(site, Think):
            return site.widen.in_features, site.narrow.out_features
        return site.ask.in_features, site.give.out_features

    def predict(self, latents: Tensor, timestep: Tensor, text: Tensor, **options: Any) -> Tensor:
        del options
        grid: Grid = latents.shape[2], latents.shape[3], latents.shape[4]
        packed = self.module(latents.flatten(2).transpose(1, 2), timestep, text, grid)
        return packed.transpose(1, 2).unflatten(2, grid)

    @property
    def rotary(self) -> nn.Module:
        return self.module.angles

    @staticmethod
    def tokens_of(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Grid]:
        tokens, grid = args
        return tokens, grid

    def set_attention(self, attend: Callable[..., Tensor] | None) -> None:
        self.tag_passes()
        for layer, (_, site) in enumerate(self.attention_sites):
            look: Any = site
            look.middle, look.layer = attend, layer


class RibbonBackbone(Backbone):
    name = "ribbon"
    class_names = frozenset({"RibbonPipeline", "RibbonTransformer", "RibbonVAE"})
    latent_space_class = RibbonLatents
    denoiser_class = RibbonDenoiser
    text_class = RibbonText

    def vae(self, dtype: torch.dtype | None = None) -> RibbonVAE:
        return load_whole(RibbonVAE, self.path, "vae", torch_dtype=dtype or torch.float32)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(Path(self.path) / "tokenizer")

    def text_encoder(self, dtype: torch.dtype | None = None) -> RibbonWords:
        return load_whole(RibbonWords, self.path, "text_encoder", torch_dtype=dtype or torch.float32)

    def denoiser(self, dtype: torch.dtype | None = None, part: str = "transformer") -> RibbonDenoiser:
        part = "" if (Path(self.path) / "config.json").is_file() else part
        loaded = RibbonDenoiser(load_whole(RibbonTransformer, self.path, part, torch_dtype=dtype or torch.float32))
        load_branches(loaded, self.path, part)
        return loaded

    def size_rules(self) -> SizeRules:
        return SizeRules(SPACE, TIME)

    def text_length(self) -> int:
        return int(self.config("tokenizer", "tokenizer_config.json")["model_max_length"])

    @classmethod
    def from_config(cls, part: str, config: Mapping[str, Any]) -> nn.Module:
        kind: Any = {"transformer": RibbonTransformer, "vae": RibbonVAE, "text_encoder": RibbonWords}[part]
        return kind(**{key: value for key, value in config.items() if not key.startswith("_")})

    @classmethod
    def build_vae(cls, sizes: Mapping[str, Any]) -> RibbonVAE:
        return build("vae", RibbonVAE, sizes)

    @classmethod
    def build_text(cls, captions: Iterable[str], length: int, sizes: Mapping[str, Any]) -> RibbonText:
        words = ["<pad>", "<unk>", *sorted({word for caption in captions for word in caption.split()})]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=length
        )
        return RibbonText(tokenizer, build("text_encoder", RibbonWords, sizes, words=len(words)))

    @classmethod
    def build_denoiser(cls, sizes: Mapping[str, Any], text_dim: int) -> RibbonDenoiser:
        return RibbonDenoiser(build("transformer", RibbonTransformer, sizes, text=text_dim))

    @classmethod
    def build_schedule(cls, shift: float) -> Schedule:
        return Schedule(FlowMatchEulerDiscreteScheduler(shift=shift))

    @classmethod
    def save_vae(cls, vae: Any, folder: Path, dtype: torch.dtype) -> None:
        copy = cls.from_config("vae", vae.config)
        copy.load_state_dict(vae.state_dict())
        with saving(folder / "vae") as new:
            copy.to(dtype).save_pretrained(new)

    @classmethod
    def save(
        cls, folder: Path, denoiser: Denoiser, text: TextConditioner, schedule: Schedule, vae: Path, dtype: torch.dtype
    ) -> None:
        net = denoiser.copy()
        net.module.load_state_dict(denoiser.module.state_dict())
        net.save(folder / "transformer", dtype)
        words = cls.from_config("text_encoder", text.encoder.config)
        words.load_state_dict(text.encoder.state_dict())
        words.to(dtype).save_pretrained(folder / "text_encoder")
        text.tokenizer.save_pretrained(folder / "tokenizer")
        schedule.scheduler.save_pretrained(folder / "scheduler")
        index = {"_class_name": "RibbonPipeline", "_diffusers_version": "0.42.1"} | {
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "text_encoder": [__name__, "RibbonWords"],
            "transformer": [__name__, "RibbonTransformer"],
            "vae": [__name__, "RibbonVAE"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
        if (folder / "vae").resolve() != (vae / "vae").resolve():
            shutil.copytree(vae / "vae", folder / "vae")


def write_ribbon(folder: Path, captions: Iterable[str] = ("a red boat",), length: int = 7) -> Path:
    """A whole backbone folder of random weights; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = RibbonBackbone.build_vae({"hidden": 24})
        text = RibbonBackbone.build_text(captions, length, {})
        denoiser = RibbonBackbone.build_denoiser({}, text.dim)
    RibbonBackbone.save_vae(vae, folder, torch.float32)
    RibbonBackbone.save(folder, denoiser, text, RibbonBackbone.build_schedule(3.0), folder, torch.float32)
    return folder
