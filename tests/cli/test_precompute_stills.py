"""Stills on the way from their files to trained models: precompute, embed, fit, score and upsample."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from luve_lightning.data.clip_windows import find_pair_keys, read_frames
from luve_lightning.data.clips import read_clip
from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentRecipe, LatentStore
from luve_lightning.data.variants import Sharpened, variant_name
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.functional.pixels import fit_frames
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.small_world import write_clip
from tests.helpers.stills import write_still_index, write_stills
from tests.helpers.upsampling import tiny_vluer

REPOSITORY = Path(__file__).resolve().parents[2]
SHARPENED = "luve_lightning.data.variants.Sharpened"
METRICS = {
    "metrics.psnr_rgb": "luve_lightning.metrics.PsnrRgb",
    "metrics.temporal_flickering": "luve_lightning.metrics.TemporalFlickering",
}

Luve = Callable[..., Outcome]


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str]) -> Luve:
    return lambda verb, *words, **options: run_luve(capsys, verb, *words, *(f"--{k}={v}" for k, v in options.items()))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64)


def encode(luve: Luve, backbone: Path, index: Path, store: Path, **options: object) -> Outcome:
    given = {"size": "[48, 48]", "scales": "[1.5, 2, 3]", "frames": 1, "batch_size": 2, "trainer.accelerator": "cpu"}
    quiet = {"trainer.enable_progress_bar": "false"}
    return luve("precompute", backbone=backbone, index=index, store=store, **(given | quiet | options))


def test_a_stills_latents_are_those_of_one_frame(luve: Luve, tmp_path: Path, tiny_backbone: Path) -> None:
    index = write_still_index(tmp_path)
    outcome = encode(luve, tiny_backbone, index, tmp_path / "latents")
    assert outcome.code == 0, outcome.err
    assert "encoded        24 latents" in outcome.out
    assert "already there  24" in encode(luve, tiny_backbone, index, tmp_path / "latents").out
    codec = load_backbone(tiny_backbone).latent_space()
    store, hashes = LatentStore(tmp_path / "latents"), ClipHashes(tmp_path / "latents")
    recipe = LatentRecipe(codec.fingerprint(), (48, 48), (1.5, 2.0, 3.0), frames=1)
    for entry in VideoIndex.open(index).entries:
        video = fit_frames(torch.from_numpy(read_clip(entry.path, 0, 1)), (48, 48))
        with torch.no_grad():
            want = codec.encode(torch.stack([video, video]))[0]
        got = store.read(recipe.key(hashes.digest(entry.path), (0, 1)))
        assert got.shape == (16, 1, 6, 6)
        torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)  # float16 on disk


def test_unreadable_stills_are_quarantined_like_clips(luve: Luve, tmp_path: Path, tiny_backbone: Path) -> None:
    index = write_still_index(tmp_path, transparent=True)
    cut = sorted((tmp_path / "stills").glob("*.jpg"))[0]
    cut.write_bytes(cut.read_bytes()[:900])
    outcome = encode(luve, tiny_backbone, index, tmp_path / "latents")
    assert outcome.code == 0, outcome.err
    assert "quarantined    2, listed in" in outcome.out
    (listed,) = (tmp_path / "latents" / "quarantine").iterdir()
    reasons = {Path(line["path"]).suffix: line["reason"] for line in map(json.loads, listed.read_text().splitlines())}
    assert "truncated" in reasons[".jpg"]
    assert "has transparent parts; name a colour behind them (luve index --matte white)" in reasons[".png"]


def test_transparent_stills_are_taken_on_a_colour_and_stored_under_it(
    luve: Luve, tmp_path: Path, tiny_backbone: Path
) -> None:
    write_stills(tmp_path / "stills", transparent=True)
    index, store = tmp_path / "index.parquet", LatentStore(tmp_path / "latents")
    outcome = luve("index", tmp_path / "stills", output=index, processes=1)
    assert "1  has transparent parts; name a colour behind them (luve index --matte white)" in outcome.out
    assert len(VideoIndex.open(index)) == 5
    recipe = LatentRecipe(load_backbone(tiny_backbone).latent_space().fingerprint(), (48, 48), (1.5, 2.0, 3.0), 1)
    latents = {}
    for matte, new in (("white", 24), ("black", 4), ("#ffffff", 0)):
        outcome = luve("index", tmp_path / "stills", output=index, matte=matte)
        assert outcome.code == 0, outcome.err
        outcome = encode(luve, tiny_backbone, index, store.root)
        assert outcome.code == 0, outcome.err
        assert f"encoded        {new} latents" in outcome.out
        entries = VideoIndex.open(index).entries
        lookup = find_pair_keys(store, ClipHashes(store.root), entries, recipe)
        assert len(lookup.pairs) == 6
        (pair,) = [pair for pair in lookup.pairs if pair.entry.matte is not None]
        assert pair.entry.path.name == "still 4 ünd.png"
        assert np.array_equal(read_frames(pair.entry, pair.hr_key)[0, 0, 0], [0 if matte == "black" else 255] * 3)
        latents[matte] = store.read(pair.hr_key)
    assert torch.equal(latents["white"], latents["#ffffff"])
    assert not torch.equal(latents["white"], latents["black"])
    scorer = {"caption": "caption", "scorer": "luve_lightning.data.scorers.SharpnessExposure"}
    assert "scored         6 clips" in luve("score", index=index, output=tmp_path / "scores", **scorer).out
    refused = luve("index", tmp_path / "stills", output=index, matte="whit")
    assert (refused.code, len(refused.error_lines)) == (2, 1)
    assert "matte: expected a colour such as white" in refused.err


class Training:
    """Runs `luve fit` of the mini world's experiments on an index of one's own, laid over with tiny configurations."""

    def __init__(self, luve: Luve, folder: Path, backbone: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.luve, self.folder, self.backbone, self.index, self.patch = luve, folder, backbone, index, monkeypatch
        self.store, self.texts = folder / "latents", folder / "texts"

    def prepare(self, frames: object) -> None:
        """Encode the clips, plain and sharpened, and their captions."""
        variants = {"variants.plain": "luve_lightning.data.variants.Unchanged", "variants.sharp": SHARPENED}
        outcome = encode(self.luve, self.backbone, self.index, self.store, frames=frames, **variants)
        assert outcome.code == 0, outcome.err
        options = {"columns": "[caption]", "length": 16, "dtype": "float32", "device": "cpu"}
        outcome = self.luve("embed", backbone=self.backbone, index=self.index, store=self.texts, **options)
        assert outcome.code == 0, outcome.err
        places = {"BACKBONE": self.backbone, "WORLD": self.folder, "LATENTS": self.store, "TEXTS": self.texts}
        for name, value in places.items():
            self.patch.setenv(f"TINY_{name}", str(value))
        self.patch.setenv("WANDB_DATA_DIR", str(self.folder / "wandb"))
        self.patch.setenv("TORCHDYNAMO_DISABLE", "1")
        self.patch.chdir(self.folder)

    def run(self, experiment: str, **options: object) -> None:
        """Train, and check that a checkpoint came of it."""
        folder = self.folder / "runs" / experiment
        self.patch.setenv("TINY_RUN", str(folder))
        names = [*(["experts/mini-lfe"] if experiment.endswith("hfe") else []), experiment]
        files = [f"experiments/{name}.yaml" for name in names] + ["tests/conf/one_step.yaml"]
        files += [f"tests/conf/{name}.yaml" for name in names]
        words = [word for file in files for word in ("--config", REPOSITORY / file)]
        data = {"index": self.index, **({"columns": "[caption]"} if experiment != "vluer/mini" else {})}
        own = {f"data.init_args.{key}": value for key, value in data.items()}
        outcome = self.luve("fit", *words, **own, **options)
        assert outcome.code == 0, f"{experiment}: {outcome.err}"
        assert list((folder / "checkpoints").glob("*.ckpt")), experiment


@pytest.mark.slow
def test_models_train_on_images_alone(
    luve: Luve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Path
) -> None:
    """The VLUer with its losses of pixels and motion, the adaptation, and an expert on sharpened ones."""
    training = Training(luve, tmp_path, tiny_backbone, write_still_index(tmp_path), monkeypatch)
    training.prepare(frames=1)
    one = {"data.init_args.frames": 1}
    training.run("vluer/mini", **one, **{"data.init_args.crop": "[1, 6, 6]"})
    training.run("experts/mini-adaptation", **one)
    training.run("experts/mini-hfe", **one, **{"data.init_args.variant": variant_name("sharp", Sharpened())})


@pytest.mark.slow
def test_models_train_on_images_and_clips_at_a_share(
    luve: Luve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_stills(tmp_path / "own")
    for number in range(4):
        write_clip(tmp_path / "own" / f"clip {number}.mp4", number, frames=9, height=60, width=64)
        (tmp_path / "own" / f"clip {number}.txt").write_text("text")
    index = tmp_path / "index.parquet"
    outcome = luve("index", tmp_path / "own", output=index)
    assert outcome.code == 0, outcome.err
    training = Training(luve, tmp_path, tiny_backbone, index, monkeypatch)
    training.prepare(frames="[1, 9]")
    mixed = {"data.init_args.frames": "[1, 9]", "data.init_args.stills_share": 0.5}
    mixed |= {"trainer.max_steps": 4, "trainer.limit_train_batches": 4, "trainer.limit_val_batches": 2}
    for experiment in ("vluer/mini", "experts/mini-adaptation", "experts/mini-lfe"):
        caplog.clear()
        training.run(experiment, **mixed, **{"trainer.val_check_interval": 4})
        # Twice as many stills as clips: at a share of one half, each still comes half as often.
        found = dict(re.findall(r"48x48x(\d): (\d+ samples of \d)", caplog.text))
        (clips, of_clips), (stills, of_stills) = (map(int, found[n].split(" samples of ")) for n in "91")
        assert clips == stills
        assert (of_clips, of_stills) == (3, 6)


def test_a_still_is_upsampled_to_pngs(luve: Luve, tmp_path: Path, tiny_backbone: Path) -> None:
    index = write_still_index(tmp_path)
    tiny_vluer().save_pretrained(tmp_path / "vluer")
    given = {"size": "[48, 48]", "scale": 2, "frames": 1, "caption": "caption", "device": "cpu"}
    given |= {"baselines": "[bilinear]", "vluers.ours": tmp_path / "vluer"}
    outcome = luve("upsample", backbone=tiny_backbone, index=index, output=tmp_path / "out", **given)
    assert outcome.code == 0, outcome.err
    names = [f"still-{number}.png" for number in range(6)]
    for folder in ("reference", "bilinear", "ours", "vae"):
        assert sorted(path.name for path in (tmp_path / "out" / folder).glob("*.png")) == names
    entry = VideoIndex.open(index).entries[0]
    video = fit_frames(torch.from_numpy(read_clip(entry.path, 0, 1)), (48, 48))
    want = ((video[:, 0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(pixels(tmp_path / "out" / "reference" / names[0]) - want).max() <= 0.51
    again = luve("upsample", backbone=tiny_backbone, index=index, output=tmp_path / "out", **given)
    assert "already there  24" in again.out
    # What was upsampled is evaluated like videos; what needs several frames says so.
    videos = {f"videos.{name}": tmp_path / "out" / name for name in ("ours", "bilinear")}
    table = tmp_path / "table.csv"
    reference = tmp_path / "out" / "reference"
    outcome = luve("evaluate", output=table, reference=reference, device="cpu", **videos, **METRICS)
    assert outcome.code == 0, outcome.err
    assert "temporal_flickering: needs at least 2 frames of a video, got 1 of 48x48" in outcome.out
    (bilinear,) = [row for row in csv.DictReader(table.open()) if row["method"] == "bilinear"]
    pairs = [[pixels(tmp_path / "out" / f / n) for f in ("bilinear", "reference")] for n in names]
    wanted = [10 * np.log10(255**2 / np.square(made - own).mean()) for made, own in pairs]
    assert float(bilinear["psnr_rgb"]) == pytest.approx(np.mean(wanted), rel=1e-4)
    assert bilinear["temporal_flickering"] == ""


def test_stills_are_scored_like_clips(luve: Luve, tmp_path: Path) -> None:
    index = write_still_index(tmp_path)
    outcome = luve(
        "score",
        index=index,
        output=tmp_path / "scores",
        caption="caption",
        scorer="luve_lightning.data.scorers.SharpnessExposure",
    )
    assert outcome.code == 0, outcome.err
    assert "scored         6 clips" in outcome.out
