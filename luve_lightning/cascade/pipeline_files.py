"""The files of a pipeline: its parts, each checked for completeness, and what distinguishes a model from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from luve_lightning.cascade.lora_files import beside
from luve_lightning.data.hashes import FileHashes
from luve_lightning.files import listing_digest
from luve_lightning.model_folders import is_local, read_config, read_header, shards_of
from luve_lightning.models.backbones import LatentSpace, TextConditioner, denoiser_of, load_backbone, recognise
from luve_lightning.models.experts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPERT
from luve_lightning.models.vluer import BaseVLUer, load_vluer

EXPERTS = "experts"  # the folder of a saved pipeline that holds one folder for each expert

ExpertFolders = str | Path | Mapping[str, str | Path] | None
"""A folder with one folder for each expert, or folders by the experts' names."""

# The files of models, tokenizers and schedulers; a README or a picture beside them changes no video.
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


def load_parts(
    backbone: str | Path,
    vluer: str | Path | BaseVLUer | None,
    refiner: str | Path | torch.nn.Module | None,
    dtypes: Mapping[str, torch.dtype],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments for diffusers' `from_pretrained`: parts, and whatever else is given.

    The first three arguments are those of `LuVePipeline.from_pretrained`. `dtypes` is from `dtypes_of`; `given` holds
    parts that exist already, the first stage's transformer perhaps as a path, and options of diffusers.

    Raises:
        FileNotFoundError: when something is not there.
        ValueError: for damaged files.
    """
    local = is_local(backbone)
    if local and not (Path(backbone) / "model_index.json").is_file():
        raise FileNotFoundError(f"backbone {backbone}: no model_index.json there; expected a diffusers pipeline folder")
    if isinstance(vluer, str | Path):
        if not (Path(vluer) / "config.json").is_file():
            raise FileNotFoundError(
                f"vluer {vluer}: no config.json there; expected a folder saved by VLUer or `luve convert vluer`"
            )
        vluer = load_vluer(vluer, dtype=dtypes.get("vluer", dtypes["default"]))
    if isinstance(refiner, str | Path):
        refiner = load_backbone(refiner).denoiser(dtypes.get("refiner", dtypes["default"])).module
    transformer = given.get("transformer")
    if isinstance(transformer, str | Path):
        transformer = load_backbone(transformer).denoiser(dtypes.get("transformer", dtypes["default"])).module
    own = {"vluer": vluer, "refiner": refiner, "transformer": transformer}
    rest = {name: part for name, part in given.items() if name not in own}
    parts = rest | {name: part for name, part in own.items() if part is not None}
    return (_whole_parts(Path(backbone), dtypes, parts) | parts) if local else parts


def check_fit(space: LatentSpace, text: TextConditioner, *transformers: torch.nn.Module | None) -> None:
    """Refuse transformers that take other latents or texts than the backbone gives.

    Raises:
        ValueError: names the transformer's origin.
    """
    for denoiser in [denoiser_of(part) for part in transformers if part is not None]:
        for what, taken, given in (
            ("latent channels", denoiser.channels, space.channels),
            ("channels of a text embedding", denoiser.text_dim, text.dim),
        ):
            if taken != given:
                origin = denoiser.module.config.get("_name_or_path") or "the transformer"
                raise ValueError(f"{origin}: takes {taken} {what}, the backbone gives {given}")


def dtypes_of(torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> dict[str, torch.dtype]:
    """Dtypes by part, and "default" for the others: a single dtype does not apply to the VAE and the VLUer."""
    if isinstance(torch_dtype, Mapping):
        return {"default": torch.float32} | dict(torch_dtype)
    return {"default": torch_dtype or torch.float32, "vae": torch.float32, "vluer": torch.float32}


def expert_folders(experts: ExpertFolders) -> dict[str | None, Path]:
    """Expert folders by name; None as name means the one that a single expert was saved with.

    Raises:
        FileNotFoundError: for a folder without experts.
    """
    if experts is None:
        return {}
    if isinstance(experts, Mapping):
        return {name: Path(folder) for name, folder in experts.items()}
    folder = Path(experts)
    if (folder / "expert.json").is_file():
        return {None: folder}
    # A folder with some of an expert's files counts, and is refused when loaded.
    found: dict[str | None, Path] = {
        path.parent.name: path.parent
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, EXPERT)
        for path in sorted(folder.glob(f"*/{name}"))
    }
    found = {name: found[name] for name in sorted(found, key=str)}
    if not found:
        raise FileNotFoundError(
            f"experts {folder}: no expert there; expected folders such as lfe/ and hfe/ with an expert.json"
        )
    return found


def _whole_parts(folder: Path, dtypes: Mapping[str, torch.dtype], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pipeline folder that are not given."""
    index = read_config(folder, "", "model_index.json")
    read_config(folder, "scheduler", "scheduler_config.json")
    backbone = load_backbone(folder)
    if len(serving := backbone.serving()) > 1:
        raise ValueError(
            f"backbone {folder}: its noise levels are shared by {' and '.join(serving)}, expected one transformer"
        )
    loaders: dict[str, Callable[[torch.dtype], Any]] = {
        "tokenizer": lambda _: backbone.tokenizer(),
        "vae": backbone.vae,
        "text_encoder": backbone.text_encoder,
        "transformer": lambda dtype: backbone.denoiser(dtype).module,
        "refiner": lambda dtype: backbone.denoiser(dtype, "refiner").module,
    }
    if any(name not in index and name not in ("vluer", "refiner") for name in given):
        return {}  # options of diffusers, such as a variant of the weights
    found = {name: index.get(name) for name in loaders if name not in given}
    return {
        name: loaders[name](dtypes.get(name, dtypes["default"]))
        for name, kind in found.items()
        if isinstance(kind, list) and None not in kind
    }


def model_identity(source: str | Path, hashes: FileHashes) -> str:
    """The identity of a model's files; equal files have the same one wherever they are.

    Args:
        source: local folder or file, or a hub id with at least one downloaded file.
        hashes: remembers the hashes of files, so that gigabytes are read once.

    Returns:
        `sha256:` and 64 hex digits, of a folder's files and their names, of shards likewise or of the file (followed
        by "+" and those of a LoRA's or a transformer's configuration beside it); or `hub:` with the id and its
        revision.

    Raises:
        FileNotFoundError: when it is neither a folder with model files nor a cached hub id.
    """
    if Path(source).is_file():
        shards = shards_of(Path(source))
        own = hashes.digest(shards[0])
        if len(shards) > 1:
            own = listing_digest((shard.name, hashes.digest(shard)) for shard in shards)
        configs = (beside(source, ADAPTER_CONFIG), _transformer_config(source))  # a LoRA's scale, or sizes
        return f"sha256:{own}" + "".join(f"+{hashes.digest(config)}" for config in configs if config is not None)
    if not is_local(source):
        return f"hub:{source}@{_revision(str(source))}"
    folder, files = Path(source), model_files(source)
    names = [path.relative_to(folder).as_posix() for path in files]
    return f"sha256:{listing_digest(zip(names, hashes.digests(files), strict=True))}"


def model_files(source: str | Path) -> list[Path]:
    """The files of a folder or a file by which `model_identity` knows it, in order; none of a hub id.

    Raises:
        FileNotFoundError: see `model_identity`.
    """
    folder = Path(source)
    if folder.is_file():
        return list(shards_of(folder))
    if not is_local(source):
        _revision(str(source))
        return []
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise FileNotFoundError(f"{source}: no model files there")
    return files


def _transformer_config(source: str | Path) -> Path | None:
    """The configuration beside a transformer's own file that its weights need."""
    try:
        known = recognise(read_header(source))
    except ValueError:  # no safetensors file, such as a LoRA in a pickle
        return None
    return None if known is None else known.config_file


def _revision(hub_id: str) -> str:
    for file in ("model_index.json", "config.json", "vae/config.json"):
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            return Path(cached).parents[len(Path(file).parts) - 1].name  # snapshots/<revision>/<file>
    raise FileNotFoundError(f"{hub_id}: not in the hub's cache on this machine")


def find_models(
    backbone: str,
    vluer: Path | None,
    needs_vluer: bool,
    refiner: Path | None,
    experts: dict[str, Path | None] | Path | None,
    lora: Path | None,
    transformer: Path | None = None,
) -> dict[str, str | Path]:
    """Where each model comes from, by the name of its option; unused models are left out.

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: when a VLUer is needed and there is none.
    """
    if not needs_vluer:
        vluer = None
    elif vluer is None and not (Path(backbone) / "vluer").is_dir():  # a saved LuVePipeline has one
        raise ValueError("vluer: required, but not given; --upsampling latent or rgb needs none")
    found: dict[str, str | Path | None] = {"vluer": vluer, "refiner": refiner, "lora": lora}
    found["transformer"] = transformer
    if isinstance(experts, Path):
        experts = {name or "expert": folder for name, folder in expert_folders(experts).items()}
    found |= {f"experts.{name}": folder for name, folder in (experts or {}).items()}
    given = {name: path for name, path in found.items() if path is not None}
    for name, path in given.items():
        if not Path(path).exists():
            raise FileNotFoundError(f"{name}: {path}: no such file or folder")
    return {"backbone": backbone, **given}
