"""Wan's folders, and its text encoder beside what tests/cli/test_embed.py compares with diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.integrations import sdpa_attention

from luve_lightning.cascade import LuVePipeline
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.backbones import CutText, CutTextWarning, load_backbone
from luve_lightning.models.backbones.wan import WanText, word_tokenizer
from tests.helpers.small_text import write_text_encoder

WORDS = ["a", "boat", "sails.", "</s>", "<unk>", "slowly"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("backbone"))


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "boat", "sails.", "slowly"]), max_size=12))
def test_words_round_trip_and_the_rest_is_cut(words: list[str]) -> None:
    tokenizer = word_tokenizer([" ".join(WORDS), "slowly a"], 8)
    assert len(tokenizer) == 3 + 4, "one token a word, beside padding, end and unknown"
    ids = tokenizer(" ".join(words), padding="max_length", truncation=True).input_ids
    kept = words[:7]  # and the end token
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == kept
    assert ids == [*tokenizer.convert_tokens_to_ids([*kept, "</s>"]), *[0] * (7 - len(kept))]


def test_unknown_words_are_one_token_each() -> None:
    tokenizer = word_tokenizer(["a boat"], 6)
    unknown = tokenizer.unk_token_id
    assert tokenizer("a plane flies").input_ids == [tokenizer.vocab["a"], unknown, unknown, 1]


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    encoder = load_backbone(write_text_encoder(tmp_path, length=5)).text()
    assert encoder.length == 5
    assert load_backbone(tmp_path).text(length=3).length == 3
    ids, mask = encoder.tokenize(["a red boat sails slowly over calm water", "birds", ""])
    assert ids.shape == mask.shape == (3, 5)
    assert mask.sum(1).tolist() == [5, 2, 1]
    assert ids[:, -1].tolist() == [1, 0, 0], "a long caption still ends with the end token"


def test_what_is_past_the_end_is_zero_and_padding_changes_nothing(backbone: Path) -> None:
    encoder = load_backbone(backbone).text()
    (long,) = encoder(["a red boat"])
    (short,) = load_backbone(backbone).text(length=4)(["a red boat"])
    torch.testing.assert_close(long[:4], short)
    assert long.shape == (16, encoder.dim)
    assert long[:4].abs().amin(1).min() > 0
    assert long[4:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_masked_to_the_bit_as_transformers_masks_it(backbone: Path, dtype: torch.dtype) -> None:
    text = load_backbone(backbone).text(dtype)
    for captions in (["a red boat", "", "birds fly"], ["calm water " * 20] * 2):  # with padding, and without
        ids, mask = text.tokenize(captions)
        with torch.no_grad():
            own, theirs = text.states(text.encoder, ids, mask), text.encoder(ids, mask).last_hidden_state
        assert torch.equal(own, theirs)
    assert not any(part._forward_hooks for part in text.encoder.modules())


def test_a_fused_kernel_takes_the_mask_of_every_version(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5.17's, too, which adds padding to the position biases and leaves the sum as it lies."""
    monkeypatch.setattr(sdpa_attention, "create_position_bias_mask", lambda biases, padding, *_: biases + padding)
    real, strides = nn.functional.scaled_dot_product_attention, []

    def watched(*args: Tensor, attn_mask: Tensor, **rest: Any) -> Tensor:
        strides.append(attn_mask.stride())
        return real(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    text = load_backbone(backbone).text()
    ids, mask = text.tokenize(["a red boat", "birds fly"])
    for encode in (lambda: text.states(text.encoder, ids, mask), lambda: text.embed(ids, mask)):
        strides.clear()
        encode()
        assert strides == 2 * [(4 * 16 * 16, 16 * 16, 16, 1)]  # two layers, four heads, 16 tokens


def test_the_fingerprint_is_of_the_numbers_and_nothing_else(backbone: Path, tmp_path: Path) -> None:
    encoder = load_backbone(backbone).text()
    fresh = encoder.fingerprint()
    encoder(["a red boat", "birds"])
    assert encoder.fingerprint() == fresh, "using a tokenizer leaves settings in it"
    assert load_backbone(backbone).text(length=8).fingerprint() == fresh, "the length is apart"
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.encoder.save_pretrained(tmp_path / "text_encoder")
    assert load_backbone(tmp_path).text().fingerprint() == fresh, "another folder, saved after use"


def test_the_fingerprint_changes_with_all_that_changes_an_embedding(backbone: Path, tmp_path: Path) -> None:
    encoder = load_backbone(backbone).text()
    seen = {encoder.fingerprint()}
    seen.add(load_backbone(backbone).text(torch.bfloat16).fingerprint())
    seen.add(load_backbone(write_text_encoder(tmp_path, seed=1)).text().fingerprint())
    tokenizer = word_tokenizer(["other words"], 16)
    seen.add(WanText(tokenizer, encoder.encoder).fingerprint())
    encoder.encoder.config.layer_norm_epsilon *= 2
    seen.add(encoder.fingerprint())
    with torch.no_grad():
        next(encoder.encoder.parameters())[0, 0].add_(1e-3)
    seen.add(encoder.fingerprint())
    assert len(seen) == 6


def test_mistakes(backbone: Path, tmp_path: Path) -> None:
    encoder = load_backbone(backbone).text()
    with pytest.raises(ValueError, match="length: expected at least 1 token, got 0"):
        load_backbone(backbone).text(length=0)
    many = word_tokenizer([" ".join(map(str, range(100)))], 16)
    with pytest.raises(ValueError, match=r"the tokenizer knows 103 tokens, the text encoder embeds \d+$"):
        WanText(many, encoder.encoder)
    write_text_encoder(tmp_path)
    (tmp_path / "tokenizer").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=f"backbone {tmp_path}: no tokenizer/ there"):
        load_backbone(tmp_path).text()
    with pytest.raises(FileNotFoundError, match="backbone runs/a/export: no such folder; expected a diffusers"):
        load_backbone("runs/a/export").text()
    (tmp_path / "other").rename(tmp_path / "tokenizer")
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="cannot load its text_encoder/: ") as error:
        load_backbone(tmp_path).text()
    assert "\n" not in str(error.value)


def test_what_is_cut_off_is_told(backbone: Path) -> None:
    nine, five = (load_backbone(backbone).text(length=length) for length in (9, 5))
    text = "a red boat  sails slowly over calm water."
    assert nine.cut(text) is None
    cut = five.cut(text)
    assert cut == CutText(9, 5, "slowly over calm water.")
    assert str(cut) == "9 tokens, of which the text encoder sees 5; cut off: 'slowly over calm water.'"
    assert str(five.cut("boat " * 99)).endswith("cut off: '" + "boat " * 12 + "...'")
    with pytest.warns(CutTextWarning, match=r"the prompt 'a red boat .*has 9 tokens.*\(the first of 2\)"):
        assert five.warn_of_cuts([text, "birds", text, "boat " * 99])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not nine.warn_of_cuts([text, "birds", ""])


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab é河.", max_size=40), length=st.integers(1, 12))
def test_what_is_seen_and_what_is_cut_off_are_the_text(backbone: Path, text: str, length: int) -> None:
    """For a tokenizer of pieces of words, as Wan's: what it keeps of the text is what stands before the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)] + [
        (piece, -1.0 - len(piece)) for piece in ("a", "b", "é", "河", ".", "ab", "▁a", "▁ab")
    ]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    conditioner = WanText(tokenizer, load_backbone(backbone).text_encoder(), length)
    cut, cleaned = conditioner.cut(text), prompt_clean(text)
    seen = tokenizer(cleaned, truncation=True, max_length=length).input_ids
    if cut is None:
        assert tokenizer(cleaned).input_ids == seen
        return
    assert cut.tokens == len(tokenizer(cleaned).input_ids) > length
    assert cleaned.endswith(cut.rest)
    before = cleaned[: len(cleaned) - len(cut.rest)]
    assert tokenizer.decode(seen, skip_special_tokens=True).replace(" ", "") == before.replace(" ", "")


def test_a_backbone_of_two_transformers_is_known_and_refused_before_it_is_loaded(
    repository: Path, tmp_path: Path
) -> None:
    mini = repository / "data/mini/wan"
    assert load_backbone(mini).serving() == {"transformer": SigmaBand()}
    index = json.loads((mini / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(mini / "scheduler", tmp_path / "scheduler")
    bands = {"transformer": SigmaBand(0.9, 1.0), "transformer_2": SigmaBand(0.0, 0.9)}
    assert load_backbone(tmp_path).serving() == bands
    with pytest.raises(ValueError, match="shared by transformer and transformer_2, expected one"):
        LuVePipeline.from_pretrained(tmp_path)
