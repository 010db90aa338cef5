"""Decoding a video: its levels, and room for it on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from luve_lightning.cascade import LuVePipeline
from luve_lightning.cascade.stages import decode, decode_bytes
from luve_lightning.functional.frames.codec import FrameCodec
from luve_lightning.models.backbones import wan_vae
from luve_lightning.models.backbones.wan_vae import WanLatentSpace
from tests.helpers.noise import noise


def test_a_video_decoded_in_parts_leaves_as_levels(tiny_cascade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    latents = noise(2, 16, 3, 8, 12)
    want = decode_bytes(pipeline, latents)
    # As on a GPU of Hopper's kind, for clips of any size.
    monkeypatch.setattr(wan_vae, "suits", lambda *_: True)
    monkeypatch.setattr(wan_vae, "WHOLE_CLIP_PIXELS", 0)
    assert pipeline.codec.streams(latents)
    levels = decode_bytes(pipeline, latents)
    monkeypatch.setattr(FrameCodec, "at_once", lambda *_: 1)
    came: list[tuple[int, np.ndarray]] = []
    last = decode_bytes(pipeline, latents[:1], lambda frames, there: came.append((there, frames[:there].copy())))[0]
    assert [there for there, _ in came] == [1, 5, 9]
    assert all(np.array_equal(frames, last[:there]) for there, frames in came)
    assert levels.shape == (2, 9, 64, 96, 3)
    # The two forms agree up to float32's rounding, which moves a value from one level to the next.
    assert np.abs(levels.astype(int) - want).max() <= 1
    assert (levels != want).mean() < 1e-3
    assert np.abs(decode(pipeline, latents) * 255 - levels).max() < 0.51
    pipeline.decode_tile = (4, 4)
    assert not pipeline.codec.streams(latents)


def test_other_models_make_room_for_decoding(tiny_cascade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LuVePipeline.from_pretrained(tiny_cascade / "wan", tiny_cascade / "vluer")
    latents, whole = noise(2, 16, 2, 8, 12), WanLatentSpace.decode
    want = (decode(pipeline, latents) * 255).round().astype(np.uint8)
    assert np.array_equal(decode_bytes(pipeline, latents), want)
    away: set[str] = set()
    moves: list[str] = []

    def move(name: str, device: object) -> None:
        away.symmetric_difference_update({name})
        moves.append(f"{name} to {device}")

    def with_little_room(self: WanLatentSpace, z: Tensor, *, out: Tensor | None = None) -> Tensor:
        if len(away) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, z, out=out)

    for name in ("text_encoder", "transformer", "vluer"):
        monkeypatch.setattr(getattr(pipeline, name), "to", lambda device, name=name: move(name, device))
    monkeypatch.setattr(WanLatentSpace, "decode", with_little_room)
    assert np.array_equal(decode_bytes(pipeline, latents), want)
    assert not away, "each is back"
    assert len(moves) == 6
    pipeline._all_hooks = [object()]  # offloaded: nothing else is on the GPU
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        decode(pipeline, latents)
