"""The fingerprint of a backbone's VAE, remembered so that training need not load the VAE for it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from luve_lightning.datasets.file_hashes import FileHashes
from luve_lightning.files import text_digest, warn_kept_in_memory, write_text
from luve_lightning.models.backbone import LatentCodec
from luve_lightning.models.folders import is_local

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def vae_fingerprint(backbone: str | Path, root: str | Path) -> str:
    """`LatentCodec.fingerprint()` of a backbone's VAE: from memory while the bytes of its files are the same.

    Args:
        backbone: a local pipeline folder or a hub id.
        root: folder of the latent store; remembers file hashes, and fingerprints under `vaes/`, where it may be
            written.

    Raises:
        FileNotFoundError: when the VAE cannot be had.
    """
    folder = _folder(backbone)
    if folder is None:
        return LatentCodec.from_pretrained(backbone).fingerprint()
    hashes = FileHashes(root)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    contents = "".join(f"{path.name} {hashes.digest(path)}\n" for path in files)
    record = Path(root) / "vaes" / text_digest(contents)
    try:
        if _FINGERPRINT.fullmatch(known := record.read_text(encoding="ascii").strip()):
            return known
    except (OSError, ValueError):
        pass  # not there, or not ours to read
    fingerprint = LatentCodec.from_pretrained(backbone).fingerprint()
    try:
        write_text(record, f"{fingerprint}\n")
    except OSError as error:
        warn_kept_in_memory(Path(root), error)
    return fingerprint


def _folder(backbone: str | Path) -> Path | None:
    """Where the VAE's files lie on this machine; None when loading must find out."""
    if is_local(backbone):
        folder = Path(backbone) / "vae"
        return folder if (folder / "config.json").is_file() else None
    cached = try_to_load_from_cache(str(backbone), "vae/config.json")
    return Path(cached).parent if isinstance(cached, str) else None
