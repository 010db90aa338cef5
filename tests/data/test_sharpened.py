"""The sharpened variant: its name, its pixels, and its place in the latent store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.filters import unsharp_mask as skimage_unsharp_mask

from luve_lightning.data.clip_hashes import ClipHashes
from luve_lightning.data.clips import read_clip
from luve_lightning.data.encode_clips import variant_name
from luve_lightning.data.latent_pairs import find_pair_keys
from luve_lightning.data.latent_recipe import LatentRecipe
from luve_lightning.data.latent_store import LatentStore
from luve_lightning.data.variants import Sharpened
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import run_luve
from tests.helpers.small_world import write_world

SHARPENED = "{class_path: luve_lightning.data.variants.Sharpened, init_args: {radius: 1.5, amount: 0.8}}"
PLAIN = "{class_path: luve_lightning.data.encode_clips.Unchanged}"
NAME = "sharpened (radius 1.5, amount 0.8)"


def test_label_tells_all_parameters_apart() -> None:
    assert variant_name("sharpened", Sharpened(1.5, 0.8)) == NAME
    assert variant_name("sharpened", Sharpened(2, 1)) == variant_name("sharpened", Sharpened(2.0, 1.0))
    assert Sharpened(1.0).label() != Sharpened(1.0 + 1e-12).label()
    assert Sharpened(1.0, 0.5).label() != Sharpened(1.0, 0.6).label()


def test_nonsense_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="radius: "):
        Sharpened(radius=-1)


def test_precompute_writes_it_beside_the_plain_one(
    capsys: pytest.CaptureFixture[str], tiny_backbone: Path, tmp_path: Path
) -> None:
    index = write_world(tmp_path, 2)
    store = LatentStore(tmp_path / "store")
    base = ["precompute", f"--backbone={tiny_backbone}", f"--index={index}", f"--store={store.root}"]
    base += ["--size=[48, 48]", "--scales=[]", "--frames=9", "--dtype=float32", "--trainer.accelerator=cpu"]
    base += ["--trainer.enable_progress_bar=false"]
    codec, entries = load_backbone(tiny_backbone).latent_space(), VideoIndex.from_csv(index).entries
    for variants, encoded in ((f"{{plain: {PLAIN}}}", 2), (f"{{plain: {PLAIN}, sharpened: {SHARPENED}}}", 2)):
        outcome = run_luve(capsys, *base, f"--variants={variants}")
        assert outcome.code == 0, outcome.err
        assert f"encoded        {encoded} latents" in outcome.out  # the second time only the sharpened ones
    recipe = LatentRecipe(codec.fingerprint(), (48, 48), (), 9, variants=("plain", NAME), dtype="float32")
    hashes = ClipHashes(store.root)
    for variant in recipe.variants:
        pairs = find_pair_keys(store, hashes, entries, recipe, variant).pairs
        frames = read_clip(entries[0].path, 0, 9)
        if variant == NAME:
            planes = np.moveaxis(frames, -1, 1).reshape(-1, 48, 48) / 255
            sharp = np.stack([skimage_unsharp_mask(plane, radius=1.5, amount=0.8) for plane in planes])
            video = torch.from_numpy(sharp.reshape(9, 3, 48, 48) * 2 - 1).float().movedim(1, 0)
        else:
            video = frames_to_video(frames)
        expected = codec.encode(video.unsqueeze(0))[0]
        torch.testing.assert_close(store.read(pairs[0].hr_key), expected, atol=1e-4, rtol=1e-3)
