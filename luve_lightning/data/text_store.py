"""Content-addressed caption embeddings on disk.

An entry is one safetensors file, `root/ab/abcdef....safetensors`, whose name is the digest of its `TextKey` and
whose metadata holds the key itself. The key covers all that the embedding depends on, so an entry never goes
stale: what no longer applies is not found. Only a caption's own tokens are stored; the zeros that diffusers'
WanPipeline puts behind them are added when it is read. A sha256 in the metadata tells flipped bits whenever an entry
is read; entries made before there was one are as valid as ever.

Training must not load the text encoder (11 GB for Wan2.1) just to learn its fingerprint, so whoever fills a store
leaves a record of what it embedded with, `root/sources/<digest>.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from luve_lightning.data.claimed_files import ClaimedFiles, StoreSize
from luve_lightning.data.latent_store import StoreError
from luve_lightning.data.safetensors_window import (
    DIGEST,
    DTYPES,
    SafetensorsWindow,
    packed,
    tensor_digest,
)
from luve_lightning.files import text_digest, write_text

# Raise it when the same caption and the same text encoder would give another embedding: another cleaning of
# captions, tokenization or masking in models/text.py.
TEXT_VERSION = 1

_NAME = "embedding"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


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
        # Exactly int: True or a numpy integer compares equal and writes other JSON.
        if type(self.length) is not int or self.length < 1:
            raise ValueError(f"length must be a whole number of tokens >= 1, got {self.length!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def key(self, caption: str) -> TextKey:
        """The entry of a caption."""
        return TextKey(caption, self)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits."""
        return text_digest(_canonical(asdict(self)))


@dataclass(frozen=True)
class TextKey:
    """One caption, exactly as the index has it, and what embeds it."""

    caption: str
    source: TextSource

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, ASCII. Equal keys have equal JSON and nothing else has."""
        return _canonical({"caption": self.caption} | asdict(self.source))

    @cached_property
    def digest(self) -> str:
        """sha256 of `json`, 64 hex digits: the entry's address."""
        return text_digest(self.json)


class TextStore:
    """A folder of caption embeddings, safe to read and write from any number of processes.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._files = ClaimedFiles(root)

    def path(self, key: TextKey) -> Path:
        """Where the entry of `key` is, or would be."""
        return self._files.path(key.digest)

    def has(self, key: TextKey) -> bool:
        """Whether there is an entry for `key`."""
        return self.path(key).exists()

    @contextmanager
    def claim(self, key: TextKey, *, wait: bool = False) -> Iterator[bool]:
        """Ask to be the one that makes an entry; see `ClaimedFiles.claim`."""
        with self._files.claim(key.digest, wait=wait) as mine:
            yield mine

    def write(self, key: TextKey, embedding: Tensor) -> int:
        """Store the embedding of a caption's own tokens, all at once, unless the entry is there already.

        Args:
            key: the entry.
            embedding: n x D with n at most the source's length, any float dtype and device; stored as its dtype.

        Returns:
            Bytes written, 0 when the entry was there.

        Raises:
            StoreError: for another shape, or a value that is not finite or does not fit the dtype.
        """
        data = packed(_NAME, _checked(key, embedding), {"key": key.json})
        return self._files.write(key.digest, data)

    def tokens(self, key: TextKey) -> int:
        """How many tokens the caption has, from the entry's header; raises like `read`."""
        with self._open(key) as file:
            return file.shape(_NAME)[0]

    def read(self, key: TextKey) -> Tensor:
        """The embedding as WanPipeline gives it to the transformer: length x D, zero past the caption's end.

        Raises:
            StoreError: when there is no entry, it is damaged, or it was made for another key.
        """
        own, _ = self._whole(key)
        padded = torch.zeros(key.source.length, own.shape[1], dtype=_DTYPES[key.source.dtype])
        padded[: len(own)] = own
        return padded

    def check(self, key: TextKey) -> bool:
        """Read an entry to see whether it is what was stored.

        Returns:
            True when it is; False when nothing tells, because the entry was made before there was a sha256.

        Raises:
            StoreError: as for `read`.
        """
        return self._whole(key)[1]

    def _whole(self, key: TextKey) -> tuple[Tensor, bool]:
        """The embedding of a caption's own tokens, and whether its sha256 was compared."""
        dtype = _DTYPES[key.source.dtype]
        with self._open(key) as file:
            try:
                count, dim = file.shape(_NAME)
                # No window is empty, a tensor can be: of the empty caption.
                own = file.read(_NAME, (None, None)) if count else torch.zeros(0, dim, dtype=dtype)
            except ValueError as error:
                raise _damaged(str(error)) from None
            known = file.metadata.get(DIGEST)
        if count > key.source.length or (known is not None and known != tensor_digest(own)):
            raise _damaged(f"{self.path(key)} holds another embedding than was stored (sha256 differs)")
        return own, known is not None

    def _open(self, key: TextKey) -> SafetensorsWindow:
        path = self.path(key)
        try:
            file = SafetensorsWindow(path)
        except FileNotFoundError:
            raise StoreError(
                f"{self.root} has no embedding of caption {_short(key.caption)} by text encoder "
                f"{key.source.encoder[:12]} ({key.source.length} tokens, {key.source.dtype}): run `luve embed`"
            ) from None
        except ValueError as error:
            raise _damaged(str(error)) from None
        try:
            if file.metadata.get("key") != key.json:
                raise StoreError(
                    f"{path} was made for another caption or text encoder than {key.json}; delete it"
                )
            file.shape_of_rank(_NAME, 2)
        except StoreError:
            file.close()
            raise
        except ValueError as error:
            file.close()
            raise _damaged(str(error)) from None
        return file

    def clean(self) -> int:
        """Remove what killed writers left behind; how many files that were."""
        return self._files.clean()

    def size(self) -> StoreSize:
        """Count entries, their bytes and unfinished files."""
        return self._files.size()

    def record(self, source: TextSource, backbone: str) -> None:
        """Note that captions were embedded with `source`, the text encoder of `backbone`."""
        path = self.root / "sources" / f"{source.digest}.json"
        text = json.dumps(asdict(source) | {"backbone": backbone}, indent=1, sort_keys=True) + "\n"
        if path.is_file() and path.read_bytes() == text.encode():
            return  # a store that is complete need not be writable
        write_text(path, text)

    def sources(self) -> dict[TextSource, str]:
        """What the captions were embedded with, and the backbone each time."""
        found: dict[TextSource, str] = {}
        for path in sorted((self.root / "sources").glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                backbone = record.pop("backbone")
                found[TextSource(**record)] = backbone
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise StoreError(f"{path} is no record of `luve embed` ({error}); delete it") from None
        return found

    def source(
        self, encoder: str | None = None, length: int | None = None, dtype: str | None = None
    ) -> TextSource:
        """The one source of a store that fits; without arguments, its only one.

        Args:
            encoder: what the text encoder's fingerprint starts with.
            length: tokens of a padded caption.
            dtype: dtype on disk.

        Raises:
            StoreError: when none fits, or more than one.
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
    """Looks captions up in a store, in place of a text encoder; can be sent to other processes."""

    store: TextStore
    source: TextSource

    def __call__(self, caption: str) -> Tensor:
        """The embedding of a caption, length x D; raises like `TextStore.read`."""
        return self.store.read(self.source.key(caption))


def _damaged(what: str) -> StoreError:
    return StoreError(f"damaged entry: {what}; delete it and run `luve embed` again")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _short(caption: str) -> str:
    return json.dumps(caption if len(caption) <= 60 else f"{caption[:57]}...")


def _checked(key: TextKey, embedding: Tensor) -> Tensor:
    """The tensor to store, or StoreError."""
    dtype, length = _DTYPES[key.source.dtype], key.source.length
    if embedding.ndim != 2 or len(embedding) > length or not embedding.is_floating_point():
        raise StoreError(
            f"an embedding must be floats n x D with n <= {length}, got {embedding.dtype} {tuple(embedding.shape)}"
        )
    # A copy: a view would keep the whole padded batch alive.
    stored = embedding.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all():
        raise StoreError(
            f"the embedding of caption {_short(key.caption)} has values that are not finite in {key.source.dtype}"
        )
    return stored
