"""What distinguishes a model's files from others: its folder's content, or its revision on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from luve_lightning.cascade.lora_files import ADAPTER_CONFIG, beside
from luve_lightning.data.hashes import FileHashes
from luve_lightning.files import listing_digest
from luve_lightning.models.folders import is_local

# The files of models, tokenizers and schedulers; a README or a picture beside them changes no video.
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


def model_identity(source: str | Path, hashes: FileHashes) -> str:
    """The identity of a model's files; equal files have the same one wherever they are.

    Args:
        source: local folder or file, or a hub id with at least one downloaded file.
        hashes: remembers the hashes of files, so that gigabytes are read once.

    Returns:
        `sha256:` and 64 hex digits, of a folder's files and their names or of the file (followed by "+" and those
        of a LoRA's configuration beside it); or `hub:` with the id and its revision.

    Raises:
        FileNotFoundError: when it is neither a folder with model files nor a cached hub id.
    """
    if Path(source).is_file():
        config = beside(source, ADAPTER_CONFIG)  # a LoRA's scale
        more = "" if config is None else f"+{hashes.digest(config)}"
        return f"sha256:{hashes.digest(source)}{more}"
    if not is_local(source):
        return f"hub:{source}@{_revision(str(source))}"
    folder = Path(source)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(f"{source}: no model files there")
    named = ((path.relative_to(folder).as_posix(), hashes.digest(path)) for path in files)
    return f"sha256:{listing_digest(named)}"


def _revision(hub_id: str) -> str:
    for file in ("model_index.json", "config.json", "vae/config.json"):
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            return Path(cached).parents[len(Path(file).parts) - 1].name  # snapshots/<revision>/<file>
    raise FileNotFoundError(f"{hub_id}: not in the hub's cache on this machine")
