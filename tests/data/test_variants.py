"""Variants of clips: sharpened, mirrored or turned, several in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import unsharp_mask as skimage_unsharp_mask

from luve_lightning.data.clip_windows import find_pair_keys
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.variants import Collage, InTurn, Sharpened, Symmetry, Unchanged, variant_name
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.functional.pixels import frames_to_video
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import run_luve
from tests.helpers.small_world import write_world

SHARPENED = "{class_path: luve_lightning.data.variants.Sharpened, init_args: {radius: 1.5, amount: 0.8}}"
PLAIN = "{class_path: luve_lightning.data.variants.Unchanged}"
NAME = "sharpened (radius 1.5, amount 0.8)"


def test_label_tells_all_parameters_apart() -> None:
    assert variant_name("sharpened", Sharpened(1.5, 0.8)) == NAME
    assert variant_name("sharpened", Sharpened(2, 1)) == variant_name("sharpened", Sharpened(2.0, 1.0))
    assert Sharpened(1.0).label() != Sharpened(1.0 + 1e-12).label()
    assert Sharpened(1.0, 0.5).label() != Sharpened(1.0, 0.6).label()


def test_nonsense_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="radius: "):
        Sharpened(radius=-1)


@pytest.mark.slow
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


def video() -> torch.Tensor:
    return torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_each_flag_is_the_plain_operation() -> None:
    x = video()
    assert torch.equal(Symmetry(mirror=True)(x), x.flip(-1))
    assert torch.equal(Symmetry(transpose=True)(x), x.transpose(-1, -2))
    assert torch.equal(Symmetry(reverse=True)(x), x.flip(2))
    assert torch.equal(Symmetry(negative=True)(x), -x)
    assert torch.equal(Symmetry(colors="gbr")(x), torch.stack([x[:, 1], x[:, 2], x[:, 0]], dim=1))


def test_they_combine_and_keep_every_value() -> None:
    x = video()
    y = Symmetry(mirror=True, transpose=True, reverse=True, negative=True, colors="bgr")(x)
    assert torch.equal(y.flatten().sort().values, (-x).flatten().sort().values)
    assert not torch.equal(y, x)


def test_a_symmetrys_label_tells_all_parameters_apart() -> None:
    made = [
        Symmetry(mirror=m, transpose=t, reverse=r, negative=n, colors=c)
        for m in (False, True)
        for t in (False, True)
        for r in (False, True)
        for n in (False, True)
        for c in ("rgb", "gbr")
    ]
    assert len({variant_name("v", s) for s in made}) == len(made)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="permutation of rgb"):
        Symmetry(colors="rrg")
    with pytest.raises(ValueError, match="square frames, got 8x6"):
        Symmetry(transpose=True)(torch.zeros(1, 3, 1, 8, 6))


def test_transforms_in_turn() -> None:
    x = torch.arange(3 * 2 * 4 * 4.0).reshape(1, 3, 2, 4, 4)
    first, second = Symmetry(mirror=True, colors="gbr"), Symmetry(transpose=True, colors="brg")
    both = InTurn([first, Unchanged(), second])
    assert torch.equal(both(x), second(first(x)))
    assert not torch.equal(both(x), first(second(x)))
    assert variant_name("both", both) == "both (mirror gbr, then transpose brg)"
    assert variant_name("none", InTurn([Unchanged()])) == "none"
    with pytest.raises(ValueError, match="transforms: expected at least one"):
        InTurn([])


def clips(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(8, 40), st.integers(8, 40), st.integers(0, 5))
def test_size_range_and_repeatability(batch: int, frames: int, height: int, width: int, pieces: int) -> None:
    video, collage = clips(batch, frames, height, width), Collage(3, pieces)
    out = collage(video)
    assert out.shape == video.shape
    assert out.isfinite().all()
    assert out.abs().max() <= 1
    assert torch.equal(out, collage(video.clone()))
    # Whatever else is in the batch.
    assert torch.equal(out[-1:], collage(video[-1:]))


def test_seeds_and_clips_differ() -> None:
    video = clips(2, 2, 24, 24)
    assert not torch.equal(Collage(0)(video), Collage(1)(video))
    first, second = Collage(0, pieces=0)(torch.stack([video[0], video[0] * 0.5]))
    assert (first - second).abs().mean() > 0.05, "the random numbers come from the pixels too"


def test_frames_that_are_equal_stay_equal() -> None:
    still = clips(1, 1, 24, 24).expand(-1, -1, 4, -1, -1)
    out = Collage(2)(still)
    assert torch.equal(out[:, :, 1:], out[:, :, :1].expand(-1, -1, 3, -1, -1))


def test_a_plain_picture_gives_plain_pieces() -> None:
    flat = torch.full((1, 3, 1, 32, 32), 0.25)
    one = Collage(5, pieces=0)(flat)
    assert (one.flatten(2).std(2) < 1e-5).all()
    several = Collage(5, pieces=4)(flat)
    assert several.flatten(2).std(2).max() > 0.05


def test_pieces_hold_detail_of_other_scales() -> None:
    """Enlarged pieces of a fine checkerboard are coarser: the power moves down."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = ((x // 2 + y // 2) % 2).float().mul(1.6).sub(0.8).expand(1, 3, 1, 64, 64)
    change = [
        (Collage(0, 0, (z, z))(board).diff(dim=4).abs().mean() / Collage(0, 0, (z, z))(board).std()).item()
        for z in (1.0, 3.0)
    ]
    assert change[1] < 0.6 * change[0]


def test_names_and_mistakes() -> None:
    assert variant_name("c1", Collage(1)) == "c1 (seed 1, 4 pieces, zoom 0.5 to 1.5)"
    for make, message in (
        (lambda: Collage(-1), "expected seed >= 0 and pieces >= 0, got -1 and 4"),
        (lambda: Collage(0, -1), "got 0 and -1"),
        (lambda: Collage(0, 4, (2.0, 1.0)), "zoom: expected 0 < least <= greatest"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
