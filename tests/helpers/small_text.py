"""A tiny real text encoder with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from luve_lightning.models.backbones.wan import word_tokenizer

WORDS = "Coloured squares drift to the left. text a red boat sails slowly over calm water while birds fly"


def write_text_encoder(folder: Path, seed: int = 0, length: int = 16) -> Path:
    """`tokenizer/` and `text_encoder/` of a backbone folder, 16 wide, random weights; returns the folder."""
    tokenizer = word_tokenizer([WORDS], length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=16,
                d_kv=4,
                d_ff=32,
                num_layers=2,
                num_heads=4,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    return folder
