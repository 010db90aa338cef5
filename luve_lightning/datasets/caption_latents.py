"""Latents of clips with what their captions say: what diffusion is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from luve_lightning.datasets.latent_key import LatentKey
from luve_lightning.datasets.latent_store import LatentStore
from luve_lightning.datasets.video_index import ClipEntry

Embed = Callable[[str], Tensor]
"""From a caption to its embedding, L x D."""


class CaptionLatents(Dataset[dict[str, Any]]):
    """Whole latents with a caption each, addressed by index or, with chance in it, by `SampleKey`.

    Args:
        store: the latents.
        items: clip and key of its latents, one an item.
        columns: caption columns; a sample takes one by chance, an index the first. None at all: every caption is
            the empty one.
        drop: chance that a sample's caption is the empty one: what classifier-free guidance needs.
        embed: looks embeddings up; None leaves captions as text.
        preload: keep all latents in memory.
    """

    def __init__(
        self,
        store: LatentStore,
        items: Sequence[tuple[ClipEntry, LatentKey]],
        columns: Sequence[str],
        drop: float = 0.0,
        embed: Embed | None = None,
        preload: bool = False,
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"drop: expected a chance in [0, 1], got {drop}")
        self.store, self.items, self.columns = store, list(items), list(columns)
        self.drop, self.embed = drop, embed
        for entry, _ in self.items:
            missing = [column for column in self.columns if column not in entry.captions]
            if missing:
                raise ValueError(
                    f"columns: {missing[0]!r} is no caption column; known: {', '.join(entry.captions)}"
                )
        self.loaded: dict[LatentKey, Tensor] = {}
        if preload:
            self.loaded = {key: store.read(key) for key in dict.fromkeys(key for _, key in self.items)}

    def __len__(self) -> int:
        return len(self.items)

    def _caption(self, index: int, key: Any) -> str:
        entry, _ = self.items[index]
        if not self.columns:
            return ""
        if isinstance(key, int):
            return entry.captions[self.columns[0]]
        rng = np.random.default_rng(list(key.seed))
        # Both are drawn always, so that one setting does not change the other's draws.
        dropped, column = rng.random() < self.drop, self.columns[int(rng.integers(len(self.columns)))]
        return "" if dropped else entry.captions[column]

    def __getitem__(self, key: Any) -> dict[str, Any]:
        index = key if isinstance(key, int) else key.index
        entry, latent_key = self.items[index]
        latents = self.loaded[latent_key] if latent_key in self.loaded else self.store.read(latent_key)
        caption = self._caption(index, key)
        # Clips have several windows; what is fixed by name is fixed for each.
        item: dict[str, Any] = {"latents": latents, "clip_id": f"{entry.clip_id}@{latent_key.frames[0]}"}
        return item | ({"caption": caption} if self.embed is None else {"text": self.embed(caption)})
