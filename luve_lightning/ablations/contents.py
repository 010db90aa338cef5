"""Identities of the files and folders that a configuration names, where they are cheap to compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luve_lightning.data.hashes import FileHashes
from luve_lightning.files import listing_digest

_MODEL_FILES = ("model_index.json", "config.json", "adapter_config.json")
# A folder of more files is a store of clips or latents. Latent and text stores name entries by what they depend
# on, so the same configuration never reads other content.
_REMEMBERED = ("file_hashes.jsonl", "clip_readings.jsonl")
_FEW = 32


class Contents:
    """Identities of what paths lead to, each looked up once.

    Args:
        root: folder of the cache of file hashes.
    """

    def __init__(self, root: Path) -> None:
        self.hashes = FileHashes(root)
        self._known: dict[str, str | None] = {}

    def named_in(self, config: Any) -> dict[str, str]:
        """Identities of everything that a configuration names, by the text that names it.

        Models count by their weights and configuration, files and small folders by their bytes. Large folders and
        missing paths do not count.
        """
        texts = sorted(set(_texts(config)))
        return {text: found for text in texts if (found := self.identity(text)) is not None}

    def identity(self, text: str) -> str | None:
        """The identity of what a path leads to; None where it does not count."""
        if text not in self._known:
            self._known[text] = self._look(text)
        return self._known[text]

    def _look(self, text: str) -> str | None:
        if len(text) > 1000 or "\n" in text or not ("/" in text or Path(text).suffix):
            return None  # a word, not a path
        path = Path(text)
        try:
            if path.is_file():
                return f"sha256:{self.hashes.digest(path)}"
            if not path.is_dir():
                return None
            if _is_model(path):
                # Imported here, because it brings every pipeline with it: seconds.
                from luve_lightning.cascade.model_identity import model_identity

                return model_identity(path, self.hashes)
            return self._small_folder(path)
        except OSError:  # a folder that is being written, or may not be read: the stage itself reports it
            return None

    def _small_folder(self, folder: Path) -> str | None:
        files = list(itertools.islice((path for path in folder.rglob("*") if path.is_file()), _FEW + 1))
        # Caches of file hashes are no content, and grow as files are looked at.
        files = sorted(path for path in files if path.name not in _REMEMBERED)
        if not 0 < len(files) <= _FEW:
            return None
        named = ((path.relative_to(folder).as_posix(), self.hashes.digest(path)) for path in files)
        return f"sha256:{listing_digest(named)}"


def _is_model(folder: Path) -> bool:
    places = (folder, *(path for path in folder.iterdir() if path.is_dir()))
    return any((place / name).is_file() for place in places for name in _MODEL_FILES)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node
