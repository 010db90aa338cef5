"""Wan2.1's family: its folders, and new small members of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.model_folders import (
    KnownWeights,
    WeightsHeader,
    cannot_load,
    is_local,
    load_whole,
    loading,
    read_config,
    read_header,
    saving,
)
from luve_lightning.models.attention import load_branches
from luve_lightning.models.backbones.base import Backbone, Schedule, build
from luve_lightning.models.backbones.denoiser import Denoiser
from luve_lightning.models.backbones.encoders import CutText, SizeRules, TextConditioner
from luve_lightning.models.backbones.wan_denoiser import WanDenoiser
from luve_lightning.models.backbones.wan_files import FAMILY, ORIGINAL_CLASS, load_transformer, single_file, wan_weights
from luve_lightning.models.backbones.wan_vae import WanLatentSpace

# Wan2.1 pads every prompt to 512 tokens. There is no text mask: another length gives other videos.
MAX_LENGTH = 512


class WanText(TextConditioner):
    """Captions to embeddings exactly as diffusers' WanPipeline makes them.

    Captions are cleaned, cut and padded to one length, encoded with the padding masked, and what lies past a caption's
    end is set to zero.

    Args:
        tokenizer: adds the end token by itself and knows how to pad.
        encoder: a UMT5 encoder.
        length: see TextConditioner; None uses the tokenizer's `model_max_length`, at most 512.
    """

    tokenizer: PreTrainedTokenizerFast
    encoder: UMT5EncoderModel

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, length: int | None = None
    ) -> None:
        super().__init__(tokenizer, encoder, length)
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer knows {len(tokenizer)} tokens, the text encoder embeds {encoder.config.vocab_size}"
            )

    @staticmethod
    def own_length(tokenizer: Any) -> int:
        """See TextConditioner."""
        return min(tokenizer.model_max_length, MAX_LENGTH)

    @staticmethod
    def states(encoder: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """See TextConditioner."""
        if mask is not None:
            # What attention adds to its scores. In a mask of 1 and 0, transformers would look for padding, and the
            # host wait for the GPU.
            added = torch.zeros(mask.shape, dtype=encoder.dtype, device=mask.device)
            mask = added.masked_fill(mask == 0, torch.finfo(encoder.dtype).min)[:, None, None]
        with ExitStack() as hooks:
            for name, part in encoder.named_modules():
                if name.endswith("relative_attention_bias"):
                    hooks.enter_context(part.register_forward_hook(_by_head))
            states: Tensor = encoder(ids, mask).last_hidden_state
        return states

    @property
    def dim(self) -> int:
        """See TextConditioner."""
        return int(self.encoder.config.d_model)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See TextConditioner."""
        tokens = self.tokenizer(
            [prompt_clean(caption) for caption in captions],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    def cut(self, text: str) -> CutText | None:
        """See TextConditioner."""
        cleaned = prompt_clean(text)
        whole = self.tokenizer(cleaned, add_special_tokens=True, truncation=False, verbose=False,
                               return_offsets_mapping=True, return_special_tokens_mask=True)  # fmt: skip
        count = len(whole.input_ids)
        if count <= self.length:
            return None
        words = [
            offset for offset, added in zip(whole.offset_mapping, whole.special_tokens_mask, strict=True) if not added
        ]
        kept = max(0, self.length - (count - len(words)))  # the end token always stays
        return CutText(count, self.length, cleaned[words[kept][0] :].strip())

    def vocabulary(self) -> dict[str, int]:
        """See TextConditioner."""
        return dict(self.tokenizer.get_vocab())

    def fingerprint(self) -> str:
        """See TextConditioner; a sha256."""
        config: dict[str, Any] = self.encoder.config.to_diff_dict()
        stable = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "transformers_version")}
        digest = hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode())
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # The last call's settings, not the tokenizer's: it would have another fingerprint after its first use.
        tokenizer["truncation"] = tokenizer["padding"] = None
        digest.update(json.dumps(tokenizer, sort_keys=True).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            # The bytes as they are: 11 GB of UMT5-XXL need no second copy in float32.
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _by_head(_module: nn.Module, _args: Any, biases: Tensor) -> Tensor:
    """Position biases as given, queries x keys x heads, but in memory one head after another.

    With the heads innermost, as UMT5 looks them up, PyTorch's fused kernels refuse the mask that transformers 5.17
    makes of them: all scores are then computed in float32. Later versions copy that mask, once for each caption.
    """
    return biases.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def word_tokenizer(captions: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the captions, for a small backbone.

    Words are what stands between spaces; `length` is the `model_max_length`.
    """
    special = ["<pad>", "</s>", "<unk>"]
    words = sorted({word for caption in captions for word in caption.split()} - set(special))
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


class WanSchedule(Schedule):
    """UniPC with flow sigmas, a second-order scheduler."""

    remembered = 2


class WanBackbone(Backbone):
    """Wan2.1's pipeline folders, and its transformers in files or folders of Wan's own layout."""

    name = FAMILY
    class_names = frozenset({"WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"})
    original_names = frozenset({ORIGINAL_CLASS})
    latent_space_class = WanLatentSpace
    denoiser_class = WanDenoiser
    text_class = WanText
    schedule_class = WanSchedule

    @classmethod
    def recognise(cls, header: WeightsHeader) -> KnownWeights | None:
        """See Backbone."""
        return wan_weights(header)

    @cached_property
    def _single(self) -> tuple[WeightsHeader, KnownWeights] | None:
        """What the file that `path` stands for holds; None for diffusers' folders and hub ids."""
        if (file := single_file(self.path)) is None:
            return None
        header = read_header(file)
        known = wan_weights(header)
        if known is None or known.refusal is not None:
            raise ValueError(f"backbone {file}: {'holds no part of Wan' if known is None else known.refusal}")
        return header, known

    def vae(self, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
        """See Backbone."""
        self._needs("vae", "vae/config.json")
        vae: AutoencoderKLWan = load_whole(
            AutoencoderKLWan, self.path, "vae", torch_dtype=dtype or torch.float32, local_files_only=is_local(self.path)
        )
        return vae

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See Backbone."""
        self._needs("tokenizer", "tokenizer")
        with loading(self.path, "tokenizer"):
            tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
                str(self.path), subfolder="tokenizer", local_files_only=is_local(self.path)
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"backbone {self.path}: its tokenizer/ has no padding token (tokenizer_config.json)")
        return tokenizer

    def text_encoder(self, dtype: torch.dtype | None = None) -> UMT5EncoderModel:
        """See Backbone."""
        self._needs("text_encoder", "text_encoder")
        encoder: UMT5EncoderModel = load_whole(
            UMT5EncoderModel,
            self.path,
            "text_encoder",
            dtype=dtype or torch.float32,
            local_files_only=is_local(self.path),
            ignore_mismatched_sizes=True,  # they are told by `load_whole`, by name
        )
        return encoder

    def _needs(self, part: str, path: str) -> None:
        """Refuse a local backbone without a file or folder."""
        if is_local(self.path) and not (Path(self.path) / path).exists():
            lacks = f"no {path}{'' if '.' in path else '/'} there; expected a diffusers pipeline folder"
            if single_file(self.path) is not None:
                lacks = f"holds a transformer, but no {part}/; expected a diffusers pipeline folder as the backbone, "
                lacks += "and this as its transformer or refiner"
            raise FileNotFoundError(f"backbone {self.path}: {lacks}")

    def config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """See Backbone; a single file's is told by its weights."""
        if part != "transformer" or self._single is None:
            return super().config(part, name)
        return {"_class_name": WanTransformer3DModel.__name__} | dict(self._single[1].sizes)

    def denoiser(self, dtype: torch.dtype | None = None, part: str = "transformer") -> WanDenoiser:
        """See Backbone. diffusers keeps norms and the time embedding in float32."""
        if self._single is not None:
            denoiser = WanDenoiser(load_transformer(*self._single, dtype or torch.float32))
            if denoiser.branches:
                load_branches(denoiser, self._single[0].path.parent, "")
            return denoiser
        folder, local = Path(self.path), is_local(self.path)
        own = local and (folder / "config.json").is_file()
        if local and not own and not (folder / part / "config.json").is_file():
            raise FileNotFoundError(
                f"backbone {self.path}: no {part}/config.json there; expected a diffusers pipeline folder or a "
                "transformer's own"
            )
        part = "" if own else part
        if local:
            kind = read_config(folder, part)["_class_name"]
            if kind != WanTransformer3DModel.__name__:
                raise FileNotFoundError(
                    f"backbone {self.path}: holds a {kind}, expected a {WanTransformer3DModel.__name__}"
                )
        denoiser = WanDenoiser(
            load_whole(
                WanTransformer3DModel, self.path, part, torch_dtype=dtype or torch.float32, local_files_only=local
            )
        )
        load_branches(denoiser, self.path, part)
        return denoiser

    def serving(self) -> Mapping[str, SigmaBand]:
        """The sigmas that each transformer serves: Wan2.2's two meet at `boundary_ratio`."""
        index = self.config("", "model_index.json")
        second = index.get("transformer_2")
        if not isinstance(second, list) or None in second:
            return super().serving()
        boundary = float(index["boundary_ratio"])
        return {"transformer": SigmaBand(boundary, 1.0), "transformer_2": SigmaBand(0.0, boundary)}

    def size_rules(self) -> SizeRules:
        """See Backbone."""
        local = is_local(self.path)
        self._needs("vae", "vae/config.json")
        found = {}
        for part, kind in (("vae", AutoencoderKLWan), ("transformer", WanTransformer3DModel)):
            if local and (Path(self.path) / part / "config.json").is_file():
                read_config(self.path, part)
            try:
                found[part] = kind.load_config(str(self.path), subfolder=part, local_files_only=local)
            except OSError as error:
                raise cannot_load(self.path, part, error) from error
        vae, patch = found["vae"], found["transformer"].get("patch_size", (1, 2, 2))
        spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
        return SizeRules(spatial * patch[1], temporal * patch[0])

    def text_length(self) -> int:
        """The tokenizer's, at most 512; 512 when it does not say."""
        try:
            config = self.config("tokenizer", "tokenizer_config.json")
        except FileNotFoundError:
            return MAX_LENGTH
        return min(int(config.get("model_max_length") or MAX_LENGTH), MAX_LENGTH)

    @classmethod
    def from_config(cls, part: str, config: Mapping[str, Any]) -> nn.Module:
        """See Backbone."""
        if part == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**config))
        kind: Any = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}[part]
        # Not the class's from_config, which logs what it does not know.
        known = kind._get_init_keys(kind)
        module: nn.Module = kind(**{key: value for key, value in config.items() if key in known})
        return module

    @classmethod
    def build_vae(cls, sizes: Mapping[str, Any]) -> AutoencoderKLWan:
        """See Backbone; `sizes` are arguments of `diffusers.AutoencoderKLWan`."""
        vae: AutoencoderKLWan = build("vae", AutoencoderKLWan, sizes)
        # Refuse other channels than those of three colours, whose pixels `patch_size` folds into more of them.
        patch = vae.config.patch_size or 1
        for key in ("in_channels", "out_channels"):
            if vae.config[key] != 3 * patch**2:
                raise ValueError(
                    f"vae.{key}: expected {3 * patch**2}, three colours in patches of {patch}x{patch}, "
                    f"got {vae.config[key]}"
                )
        return vae

    @classmethod
    def build_text(cls, captions: Iterable[str], length: int, sizes: Mapping[str, Any]) -> WanText:
        """See Backbone; `sizes` are arguments of `transformers.UMT5Config`, and the vocabulary's size is added."""
        tokenizer = word_tokenizer(captions, length)
        config = build(
            "text_encoder",
            UMT5Config,
            sizes,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return WanText(tokenizer, build("text_encoder", UMT5EncoderModel, {}, config=config))

    @classmethod
    def build_denoiser(cls, sizes: Mapping[str, Any], text_dim: int) -> WanDenoiser:
        """See Backbone; `sizes` are arguments of `diffusers.WanTransformer3DModel`."""
        return WanDenoiser(build("transformer", WanTransformer3DModel, sizes, text_dim=text_dim))

    @classmethod
    def build_schedule(cls, shift: float) -> WanSchedule:
        """The scheduler of Wan2.1's pipelines at a shift."""
        return WanSchedule(
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
            )
        )

    @classmethod
    def save_vae(cls, vae: Any, folder: Path, dtype: torch.dtype) -> None:
        """See Backbone."""
        # Not `from_config`: it restores the class's defaults for whatever was not given when the VAE was made.
        exported = AutoencoderKLWan(**{k: v for k, v in vae.config.items() if not k.startswith("_")})
        exported.load_state_dict(vae.state_dict())
        with saving(folder / "vae") as new:
            exported.to(dtype).save_pretrained(new)

    @classmethod
    def save(
        cls, folder: Path, denoiser: Denoiser, text: TextConditioner, schedule: Schedule, vae: Path, dtype: torch.dtype
    ) -> None:
        """See Backbone."""
        net = denoiser.copy()
        net.module.load_state_dict(denoiser.module.state_dict())
        encoder = UMT5EncoderModel(text.encoder.config)
        encoder.load_state_dict(text.encoder.state_dict())
        net.save(folder / "transformer", dtype)
        encoder.to(dtype).save_pretrained(folder / "text_encoder")
        text.tokenizer.save_pretrained(folder / "tokenizer")
        schedule.scheduler.save_pretrained(folder / "scheduler")
        pipeline = WanPipeline(
            tokenizer=text.tokenizer,
            text_encoder=encoder,
            vae=cls(vae).vae(),
            scheduler=schedule.scheduler,
            transformer=net.module,
        )
        pipeline.save_config(folder)
        # Copied as files: loading and saving again would change the bytes.
        if (folder / "vae").resolve() != (vae / "vae").resolve():
            shutil.copytree(vae / "vae", folder / "vae", dirs_exist_ok=True)
