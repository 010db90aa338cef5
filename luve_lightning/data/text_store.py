"""Caption embeddings on disk, and embedding captions; see `luve_lightning.data.store`.

Training must not load the text encoder (11 GB for Wan2.1) just to learn its fingerprint, so whatever fills a store
records what it embedded with, in `root/sources/<digest>.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from luve_lightning.data.store import StoreError, TensorStore
from luve_lightning.data.video_index import CAPTIONS, ClipEntry
from luve_lightning.files import text_digest, write_text
from luve_lightning.locks import share_work
from luve_lightning.machine import UnitTimes
from luve_lightning.models.backbones import CutText, TextConditioner
from luve_lightning.safetensors_window import DTYPE_NAMES

# Raise it when the same caption and the same text encoder would give another embedding: another cleaning of
# captions, tokenization or masking in models/backbones.
TEXT_VERSION = 1
_WRITERS = 8
_BATCHES = 4  # that a process takes at once: it writes one of them while it embeds the next


@dataclass(frozen=True)
class TextSource:
    """Everything but the caption that decides the numbers of a stored embedding.

    Attributes:
        encoder: fingerprint of the text encoder's configuration and weights and of its tokenizer.
        length: tokens of a padded caption, >= 1; longer captions are cut.
        dtype: dtype on disk: "float16", "bfloat16" or "float32".
        version: `TEXT_VERSION` of the code that embedded it.
    """

    encoder: str
    length: int
    dtype: str = "bfloat16"
    version: int = TEXT_VERSION

    def __post_init__(self) -> None:
        if not self.encoder:
            raise ValueError("encoder must be the text encoder's fingerprint, got an empty text")
        # Exactly int: True or a numpy integer compares equal but writes other JSON.
        if type(self.length) is not int or self.length < 1:
            raise ValueError(f"length must be a whole number of tokens >= 1, got {self.length!r}")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")

    def key(self, caption: str) -> TextKey:
        """The entry of a caption."""
        return TextKey(caption, self)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        return text_digest(_canonical(asdict(self)))


@dataclass(frozen=True)
class TextKey:
    """One caption, exactly as in the index, and what embeds it."""

    caption: str
    source: TextSource

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Two keys are equal exactly when their JSON is."""
        return _canonical({"caption": self.caption} | asdict(self.source))

    @cached_property
    def digest(self) -> str:
        """sha256 of `json`, 64 hex digits: the entry's address."""
        return text_digest(self.json)


class TextStore(TensorStore[TextKey]):
    """A folder of caption embeddings n x D, n at most the source's length.

    Only a caption's own tokens are stored; reading appends the zeros that pad it to the source's length.
    """

    entries, verb, damage = "embeddings", "embed", "another embedding than was stored"
    tensor, rank = "embedding", 2

    def read(self, key: TextKey) -> Tensor:
        """The embedding as given to the transformer: length x D, zero past the caption's end.

        Raises:
            StoreError: when there is no entry, it is damaged, or it was made for another key.
        """
        own, _ = self._whole(key)
        padded = torch.zeros(key.source.length, own.shape[1], dtype=DTYPE_NAMES[key.source.dtype])
        padded[: len(own)] = own
        return padded

    def fits(self, key: TextKey, tensor: Tensor) -> bool:
        """Whether the shape fits; only the empty caption may have no token."""
        return len(tensor) <= key.source.length

    def missing(self, key: TextKey) -> str:
        """Names the caption."""
        return (
            f"{self.root} has no embedding of caption {_short(key.caption)} by text encoder "
            f"{key.source.encoder[:12]} ({key.source.length} tokens, {key.source.dtype}): run `luve embed`"
        )

    def checked(self, key: TextKey, tensor: Tensor) -> Tensor:
        """Floats n x D, all finite in the source's dtype."""
        dtype, length = DTYPE_NAMES[key.source.dtype], key.source.length
        if tensor.ndim != 2 or len(tensor) > length or not tensor.is_floating_point():
            raise StoreError(
                f"an embedding must be floats n x D with n <= {length}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        # A copy: a view would keep the whole padded batch alive.
        stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(stored).all():
            raise StoreError(
                f"the embedding of caption {_short(key.caption)} has values that are not finite in {key.source.dtype}"
            )
        return stored

    def record(self, source: TextSource, backbone: str) -> None:
        """Record that captions were embedded with `source`, the text encoder of `backbone`."""
        path = self.root / "sources" / f"{source.digest}.json"
        text = json.dumps(asdict(source) | {"backbone": backbone}, indent=1, sort_keys=True) + "\n"
        if path.is_file() and path.read_bytes() == text.encode():
            return  # a complete store need not be writable
        write_text(path, text)

    def sources(self) -> dict[TextSource, str]:
        """What the captions were embedded with, with each backbone."""
        found: dict[TextSource, str] = {}
        for path in sorted((self.root / "sources").glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                backbone = record.pop("backbone")
                found[TextSource(**record)] = backbone
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise StoreError(f"{path} is no record of `luve embed` ({error}); delete it") from None
        return found

    def source(self, encoder: str | None = None, length: int | None = None, dtype: str | None = None) -> TextSource:
        """The one source of a store that fits; without arguments, its only one.

        Args:
            encoder: beginning of the text encoder's fingerprint.
            length: tokens of a padded caption.
            dtype: dtype on disk.

        Raises:
            StoreError: when none fits, or several do.
        """
        known = {source: at for source, at in self.sources().items() if source.version == TEXT_VERSION}
        fitting = [
            source
            for source in known
            if source.encoder.startswith(encoder or "")
            and length in (None, source.length)
            and dtype in (None, source.dtype)
        ]
        if len(fitting) == 1:
            return fitting[0]
        found = "more than one kind of embedding" if fitting else "no such embeddings"
        listed = [f"{s.encoder[:12]} of {at}, {s.length} tokens, {s.dtype}" for s, at in known.items()]
        raise StoreError(
            f"{self.root}: {found} for encoder {encoder or 'any'}, length {length or 'any'}, dtype {dtype or 'any'}; "
            f"there are: {'; '.join(sorted(listed)) or 'none, run `luve embed`'}"
        )


@dataclass(frozen=True)
class StoredEmbeddings:
    """Looks up captions in a store, in place of a text encoder; can be sent to other processes."""

    store: TextStore
    source: TextSource

    def __call__(self, caption: str) -> Tensor:
        """The embedding of a caption, length x D; raises like `TextStore.read`."""
        return self.store.read(self.source.key(caption))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _short(caption: str) -> str:
    return json.dumps(caption if len(caption) <= 60 else f"{caption[:57]}...")


@dataclass
class EmbedReport:
    """Counts of a run.

    Attributes:
        embedded: number of captions embedded and stored.
        bytes: bytes written for them.
        cut: number of these captions that were longer than the text encoder's length and were cut.
        first_cut: the first of them, and what it lost.
        there: number of captions found in the store, or stored by another process meanwhile.
    """

    embedded: int = 0
    bytes: int = 0
    cut: int = 0
    first_cut: tuple[str, CutText] | None = None
    there: int = 0


def captions_of(entries: Iterable[ClipEntry], columns: Sequence[str]) -> list[str]:
    """Every caption once, in order, after the empty one, which classifier-free guidance needs.

    Raises:
        ValueError: for a column that some clip's captions do not have, or no column.
    """
    texts = [entry.captions for entry in entries]
    known = [name for name in (texts[0] if texts else CAPTIONS) if all(name in captions for captions in texts)]
    unknown = [column for column in columns if column not in known]
    if unknown or not columns:
        what = f"{unknown[0]!r} is no caption column" if unknown else "at least one is needed"
        raise ValueError(f"columns: {what}; known: {', '.join(known)}")
    return list(dict.fromkeys(["", *(captions[column] for captions in texts for column in columns)]))


def embed_captions(
    encoder: TextConditioner,
    store: TextStore,
    source: TextSource,
    captions: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None],
    times: UnitTimes | None = None,
) -> EmbedReport:
    """Embed captions and store them. When it returns, the store has every one.

    Processes that share a store share the work, see `share_work`.

    Args:
        encoder: on the device that computes; its length is the source's.
        store: where to.
        source: what the embeddings depend on besides the caption.
        captions: each once.
        batch_size: captions encoded at once, >= 1.
        advance: called with the number of further captions that are finished.
        times: counts those that are embedded.

    Raises:
        ValueError: for a tokenizer that pads in front of captions.
        StoreError: when an embedding cannot be stored.
    """
    keys = [source.key(caption) for caption in captions]
    # Each entry waits for the disk, longer than a GPU takes for it.
    with ThreadPoolExecutor(min(batch_size, _WRITERS)) as writers:
        work = _Work(encoder, store, EmbedReport(), advance, times or UnitTimes("caption"), writers, batch_size)
        share_work(keys, store.has, store.claim, work.embed, _BATCHES * batch_size, work.found)
    return work.report


@dataclass
class _Batch:
    """Captions that are being written: the bytes of each, and those that fill the whole length."""

    sizes: list[Future[int]]
    full: list[str]


@dataclass
class _Work:
    encoder: TextConditioner
    store: TextStore
    report: EmbedReport
    advance: Callable[[int], None]
    times: UnitTimes
    writers: ThreadPoolExecutor
    batch_size: int

    def found(self, key: TextKey) -> None:
        self.report.there += 1
        self.advance(1)

    @torch.inference_mode()
    def embed(self, keys: Sequence[TextKey]) -> None:
        """Embed and store captions, a batch at a time."""
        self.times.begin()
        before = _Batch([], [])
        try:
            for start in range(0, len(keys), self.batch_size):
                batch = keys[start : start + self.batch_size]
                ids, mask = self.encoder.tokenize([key.caption for key in batch])
                counts = mask.sum(1).tolist()
                if any(row[:count].sum() != count for row, count in zip(mask, counts, strict=True)):
                    raise ValueError("the tokenizer pads in front of captions; expected one that pads behind them")
                padded = self.encoder.embed(ids, mask)
                self._count(before)  # while the device computes
                # One transfer from the device, not one per caption, and none of the padding, most of it.
                embeddings = padded[mask.to(padded.device).bool()].cpu().split(counts)
                del padded
                self.times.advance(len(batch))
                full = [key.caption for key, count in zip(batch, counts, strict=True) if count == mask.shape[1]]
                entries = zip(batch, embeddings, strict=True)
                before = _Batch([self.writers.submit(self.store.write, *entry) for entry in entries], full)
            self._count(before)
        finally:
            wait(before.sizes)  # their claims end with this call

    def _count(self, batch: _Batch) -> None:
        """Wait until a batch is written, and count it."""
        if not batch.sizes:
            return
        self.report.bytes += sum(size.result() for size in batch.sizes)
        self.report.embedded += len(batch.sizes)
        for caption in batch.full:
            self._look_at(caption)
        self.advance(len(batch.sizes))

    def _look_at(self, caption: str) -> None:
        """Count a caption that fills the whole length if it is longer."""
        cut = self.encoder.cut(caption)
        if cut is not None:
            self.report.cut += 1
            self.report.first_cut = self.report.first_cut or (caption, cut)
