"""Wan2.1's text encoder: captions to the embeddings for its cross-attention."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from luve_lightning.models.backbones.base import CutText, TextConditioner

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
            offset
            for offset, added in zip(whole.offset_mapping, whole.special_tokens_mask, strict=True)
            if not added
        ]
        kept = max(0, self.length - (count - len(words)))  # the end token always stays
        return CutText(count, self.length, cleaned[words[kept][0] :].strip())

    def vocabulary(self) -> dict[str, int]:
        """See TextConditioner."""
        return dict(self.tokenizer.get_vocab())

    def fingerprint(self) -> str:
        """See TextConditioner; a sha256."""
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
