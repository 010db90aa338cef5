"""The backbone's text encoder: captions to the embeddings that Wan's cross-attention sees."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from luve_lightning.models.folders import is_local, load_whole, loading

# Wan2.1 pads every prompt to 512 tokens. There is no text mask: another length gives other videos.
MAX_LENGTH = 512
_SHOWN = 60  # characters of a text that is cut


class CutTextWarning(UserWarning):
    """A text is longer than the text encoder reads."""


@dataclass(frozen=True)
class CutText:
    """What a text encoder does not see of a text.

    Attributes:
        tokens: of the whole text, the end token included.
        length: how many are seen.
        rest: the words from the first on that is not seen whole.
    """

    tokens: int
    length: int
    rest: str

    def __str__(self) -> str:
        shown = self.rest if len(self.rest) <= _SHOWN else f"{self.rest[:_SHOWN]}..."
        return f"{self.tokens} tokens, of which the text encoder sees {self.length}; cut off: {shown!r}"


def cut_text(tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> CutText | None:
    """What is cut off a text that is longer than `length` tokens; None when nothing is."""
    cleaned = prompt_clean(text)
    whole = tokenizer(cleaned, add_special_tokens=True, truncation=False, verbose=False,
                      return_offsets_mapping=True, return_special_tokens_mask=True)  # fmt: skip
    count = len(whole.input_ids)
    if count <= length:
        return None
    words = [
        offset
        for offset, added in zip(whole.offset_mapping, whole.special_tokens_mask, strict=True)
        if not added
    ]
    kept = max(0, length - (count - len(words)))  # the end token always stays
    return CutText(count, length, cleaned[words[kept][0] :].strip())


def warn_of_cuts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], length: int) -> bool:
    """Warn of texts longer than `length` tokens, with a count and the first of them; whether there was any."""
    cuts = [
        (text, cut) for text in dict.fromkeys(texts) if (cut := cut_text(tokenizer, text, length)) is not None
    ]
    if cuts:
        text, cut = cuts[0]
        more = f" (the first of {len(cuts)})" if len(cuts) > 1 else ""
        warnings.warn(f"the prompt {text[:_SHOWN]!r}... has {cut}{more}", CutTextWarning, stacklevel=3)
    return bool(cuts)


class TextEncoder(nn.Module):
    """Captions to embeddings exactly as diffusers' WanPipeline makes them.

    Captions are cleaned, cut and padded to one length, encoded with the padding masked, and what lies past a caption's
    end is set to zero.

    Args:
        tokenizer: adds the end token by itself and knows how to pad.
        encoder: a UMT5 encoder.
        length: tokens of every caption, padding included; None takes the tokenizer's `model_max_length`, at most 512.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, length: int | None = None
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = min(tokenizer.model_max_length, MAX_LENGTH) if length is None else length
        if self.length < 1:
            raise ValueError(f"length: expected at least 1 token, got {self.length}")
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer knows {len(tokenizer)} tokens, the text encoder embeds {encoder.config.vocab_size}"
            )

    @classmethod
    def from_pretrained(
        cls, backbone: str | Path, dtype: torch.dtype | None = None, length: int | None = None
    ) -> TextEncoder:
        """Load `tokenizer/` and `text_encoder/` of a backbone.

        Args:
            backbone: a local pipeline folder or a hub id.
            dtype: dtype of the weights; float32 when None.
            length: see TextEncoder.

        Raises:
            FileNotFoundError: when either cannot be had.
            ValueError: when files are damaged or of another model.
        """
        local = is_local(backbone)
        for part in ("tokenizer", "text_encoder") if local else ():
            if not (Path(backbone) / part).is_dir():
                raise FileNotFoundError(
                    f"backbone {backbone}: no {part}/ there; expected a diffusers pipeline folder"
                )
        tokenizer, encoder = load_tokenizer(backbone), load_text_encoder(backbone, dtype)
        return cls(tokenizer, encoder, length).requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.encoder.config.d_model)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 where there is a token), both int64 B x `length`, on the CPU."""
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

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of tokens, B x length x dim, zero past each caption's end."""
        device = next(self.encoder.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states: Tensor = self.encoder(ids, mask).last_hidden_state
        return states * mask.gt(0).unsqueeze(-1).to(states.dtype)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, B x length x dim, on the encoder's device."""
        return self.embed(*self.tokenize(captions))

    def fingerprint(self) -> str:
        """sha256 of tokenizer, configuration and weights: what a stored embedding depends on, its length aside."""
        config: dict[str, Any] = self.encoder.config.to_diff_dict()
        stable = {
            k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "transformers_version")
        }
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


def load_tokenizer(backbone: str | Path) -> PreTrainedTokenizerFast:
    """Load `tokenizer/` of a backbone.

    Raises:
        FileNotFoundError: when it cannot be had.
        ValueError: when its files are damaged or do not say how to pad.
    """
    with loading(backbone, "tokenizer"):
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            str(backbone), subfolder="tokenizer", local_files_only=is_local(backbone)
        )
    if tokenizer.pad_token is None:
        raise ValueError(f"backbone {backbone}: its tokenizer/ has no padding token (tokenizer_config.json)")
    return tokenizer


def load_text_encoder(backbone: str | Path, dtype: torch.dtype | None = None) -> UMT5EncoderModel:
    """Load `text_encoder/` of a backbone.

    Args:
        backbone: a local pipeline folder or a hub id.
        dtype: dtype of the weights; float32 when None.

    Raises:
        FileNotFoundError: when it cannot be had.
        ValueError: when its files are damaged or of another model.
    """
    encoder: UMT5EncoderModel = load_whole(
        UMT5EncoderModel,
        backbone,
        "text_encoder",
        dtype=dtype or torch.float32,
        local_files_only=is_local(backbone),
        ignore_mismatched_sizes=True,  # they are told by `load_whole`, by name
    )
    return encoder


def word_tokenizer(captions: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the captions, for a small backbone.

    Args:
        captions: words are what stands between spaces.
        length: `model_max_length`.
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
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )
