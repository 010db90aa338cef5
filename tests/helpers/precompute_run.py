"""`luve precompute` as a real process, on a small world."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from luve_lightning.data.hashes import ClipHashes
from luve_lightning.data.latent_store import LatentKey, LatentRecipe, LatentStore
from luve_lightning.data.video_index import VideoIndex
from luve_lightning.models.backbones import load_backbone
from tests.helpers.luve_process import LuveProcess
from tests.helpers.store_size import store_size
from tests.helpers.waiting import wait_for


class PrecomputeRun(LuveProcess):
    """One `luve precompute` of 48x48 pixels, 9 frames and three scales, one window a batch.

    Args:
        folder: where its output goes.
        backbone: with the VAE.
        index: CSV of the clips.
        store: folder of the latents.
        options: more words for the command line.
        environment: more variables.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Path,
        index: Path,
        store: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        log = folder / f"output-{len(list(folder.glob('output-*')))}"
        words = [f"--backbone={backbone}", f"--index={index}", f"--store={store}", "--size=[48, 48]"]
        words += ["--scales=[1.5, 2, 3]", "--frames=9", "--batch_size=1", "--trainer.accelerator=cpu"]
        words += ["--trainer.enable_progress_bar=false", *options]
        super().__init__(log, "precompute", *words, environment=environment)

    def encoded(self) -> int:
        """Wait for the end, and how many latents it says it has written."""
        found = re.search(r"encoded +(\d+) latents?", self.finish())
        assert found, self.text()
        return int(found[1])


def keys_of_last_clip(backbone: Path, index: Path) -> list[LatentKey]:
    """What a run stores last. Whoever holds claims on these keeps it from ending."""
    vae = load_backbone(backbone).latent_space().fingerprint()
    recipe = LatentRecipe(vae, (48, 48), (1.5, 2.0, 3.0), frames=9)
    clip = VideoIndex.from_csv(index).entries[-1].path
    return list(recipe.keys(ClipHashes(index.parent).digest(clip), (0, 9)).values())


def wait_for_entries(store: LatentStore, count: int, run: PrecomputeRun) -> None:
    """Return as soon as the store holds so many entries while the run goes on."""
    there = wait_for(lambda: store_size(store.root).entries >= count or not run.alive(), every=0.002)
    assert there, run.text()
    assert run.alive(), run.text()
