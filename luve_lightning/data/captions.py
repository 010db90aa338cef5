"""The work of `luve embed`: captions through the text encoder, unless their embeddings are in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from luve_lightning.data.text_store import TextKey, TextSource, TextStore
from luve_lightning.data.video_index import CAPTIONS, ClipEntry
from luve_lightning.models.backbones import CutText, TextConditioner


@dataclass
class EmbedReport:
    """What a run did.

    Attributes:
        embedded: captions embedded and stored.
        bytes: written for them.
        cut: of these, captions that were longer than the text encoder's length, and so were cut to it.
        first_cut: the first of them, and what it lacks.
        there: captions found in the store, or stored by another process meanwhile.
    """

    embedded: int = 0
    bytes: int = 0
    cut: int = 0
    first_cut: tuple[str, CutText] | None = None
    there: int = 0


def captions_of(entries: Iterable[ClipEntry], columns: Sequence[str]) -> list[str]:
    """Every caption once, in order, after the empty one, which classifier-free guidance needs.

    Raises:
        ValueError: for a column that is not one of UltraVideo's caption columns, or none.
    """
    unknown = [column for column in columns if column not in CAPTIONS]
    if unknown or not columns:
        what = f"{unknown[0]!r} is no caption column" if unknown else "at least one is needed"
        raise ValueError(f"columns: {what}; known: {', '.join(CAPTIONS)}")
    return list(dict.fromkeys(["", *(entry.captions[column] for entry in entries for column in columns)]))


def embed_captions(
    encoder: TextConditioner,
    store: TextStore,
    source: TextSource,
    captions: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None],
) -> EmbedReport:
    """Embed captions and store them. When it returns, the store has every one.

    Processes that share a store share the work: each takes what no other is making, and at the end waits for what
    others have taken, to do it itself if they die.

    Args:
        encoder: on the device that computes; its length is the source's.
        store: where to.
        source: what the embeddings depend on besides the caption.
        captions: each once.
        batch_size: captions encoded at once, >= 1.
        advance: told how many more captions are there.

    Raises:
        ValueError: for a tokenizer that pads in front of captions.
        StoreError: when an embedding cannot be stored.
    """
    keys = [source.key(caption) for caption in captions]
    work = _Work(encoder, store, EmbedReport(), advance)
    taken = work.run(keys, batch_size, wait=False)
    # One at a time: a process that waits while it holds claims could wait for one that waits for it.
    work.run(taken, 1, wait=True)
    return work.report


@dataclass
class _Work:
    encoder: TextConditioner
    store: TextStore
    report: EmbedReport
    advance: Callable[[int], None]

    def run(self, keys: Sequence[TextKey], batch_size: int, wait: bool) -> list[TextKey]:
        """Embed what is missing; returns what other processes are making, none if `wait`."""
        todo, taken = list(reversed(keys)), []
        while todo:
            with ExitStack() as claims:
                batch: list[TextKey] = []
                while todo and len(batch) < batch_size:
                    key = todo.pop()
                    if self._claim(key, claims, wait):
                        batch.append(key)
                    elif self.store.has(key):
                        self.report.there += 1
                        self.advance(1)
                    else:
                        taken.append(key)
                if batch:
                    self._embed(batch)
        return taken

    def _claim(self, key: TextKey, claims: ExitStack, wait: bool) -> bool:
        if self.store.has(key):  # a claim would make a file and remove it again
            return False
        with ExitStack() as own:
            if not own.enter_context(self.store.claim(key, wait=wait)):
                return False
            claims.enter_context(own.pop_all())
        return True

    @torch.inference_mode()
    def _embed(self, batch: Sequence[TextKey]) -> None:
        ids, mask = self.encoder.tokenize([key.caption for key in batch])
        counts = mask.sum(1).tolist()
        if any(row[:count].sum() != count for row, count in zip(mask, counts, strict=True)):
            raise ValueError("the tokenizer pads in front of captions; expected one that pads behind them")
        # One transfer from the device, not one a caption.
        for key, count, embedding in zip(batch, counts, self.encoder.embed(ids, mask).cpu(), strict=True):
            self.report.bytes += self.store.write(key, embedding[:count])
            self.report.embedded += 1
            if count == mask.shape[1]:
                self._look_at(key.caption)
        self.advance(len(batch))

    def _look_at(self, caption: str) -> None:
        """Count a caption that fills the whole length if it is longer."""
        cut = self.encoder.cut(caption)
        if cut is not None:
            self.report.cut += 1
            self.report.first_cut = self.report.first_cut or (caption, cut)
