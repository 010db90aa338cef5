"""Folders of models: where a backbone's parts come from, and how a model is written; also single files of weights."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
import torch
import transformers
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from luve_lightning.files import read_json, replacing_folder
from luve_lightning.terminal import amount

# diffusers, PEFT and we look for these first: a folder without one holds no model.
_FIRST_READ = ("model_index.json", "config.json", "expert.json")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
BRANCH_WEIGHTS = "attention.safetensors"
"""File of a replaced attention's parameters, beside the transformer's own weights, which diffusers loads."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # organisation/name
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"


def is_local(backbone: str | Path) -> bool:
    """Whether a backbone is a local folder or file; otherwise it has the form of a hub id.

    Raises:
        FileNotFoundError: when it is neither.
    """
    local = Path(backbone).exists()
    if not local and not _HUB_ID.fullmatch(str(backbone)):
        raise FileNotFoundError(
            f"backbone {backbone}: no such folder; expected a diffusers pipeline folder or a hub id"
        )
    return local


def hub_file(backbone: str | Path, name: str, part: str = "") -> Path:
    """A file of a backbone from the hub, or from its cache.

    Raises:
        OSError: where it is in neither. Where the hub's name has no address, the cache alone is asked: the hub's own
            library tries for half a minute, for each file.
    """
    offline: OSError | None = None
    if not getproxies().keys() & {"https", "all"}:
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError as error:
            offline = error
    try:
        return Path(hf_hub_download(str(backbone), name, subfolder=part or None, local_files_only=offline is not None))
    except LocalEntryNotFoundError as error:
        if offline is None:
            raise
        raise LocalEntryNotFoundError(str(error)) from offline


def cannot_load(backbone: str | Path, part: str, error: BaseException) -> FileNotFoundError | ValueError:
    """The error to raise when a library could not load a model, or a part of a backbone.

    Args:
        backbone: folder or hub id.
        part: its subfolder or a file in it; empty for a model's own folder.
        error: the library's error.

    Returns:
        A FileNotFoundError for missing files, a ValueError for damaged ones.
    """
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if reason and not isinstance(error, OSError):
        reason = f"{type(error).__name__}: {reason}"
    reason = reason or "no reason given"
    name = part if "." in part else f"{part}/"
    where = f"backbone {backbone}: cannot load its {name}" if part else f"{backbone}: cannot be loaded"
    if part and not Path(backbone).exists():
        where = f"backbone {backbone}: no such folder, and its {name} is not available from the hub"
        reason = f"{_hubs_reason(error) or reason}; a local pipeline folder works without the hub"
    kind = FileNotFoundError if isinstance(error, OSError) else ValueError
    return kind(f"{where}: {reason}")


@contextmanager
def loading(backbone: str | Path, part: str) -> Iterator[None]:
    """Turn whatever a library raises while reading a model's files into one line; see `cannot_load`.

    Raises:
        FileNotFoundError: for files that the library reports as missing or unreadable.
        ValueError: for files that are cut short or of another kind.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Anything at all: libraries raise KeyError, TypeError, RecursionError, and Rust's bare Exception.
    except Exception as error:
        raise cannot_load(backbone, part, error) from error


def load_whole(kind: Any, source: str | Path, part: str, **options: Any) -> Any:
    """A model whose files hold all its weights, and nothing else.

    Libraries replace missing weights by random numbers and ignore unknown ones, with a warning.

    Args:
        kind: diffusers or transformers class.
        source: folder or hub id.
        part: subfolder of a backbone; empty when the model lies in `source` itself.
        options: options of its `from_pretrained`.

    Raises:
        FileNotFoundError: when it is not available.
        ValueError: when files are damaged, or hold other weights than the model's configuration requires.
    """
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity(logger.CRITICAL)  # what they would warn of is checked below
        with loading(source, part):
            model, about = kind.from_pretrained(
                str(source), subfolder=part or None, output_loading_info=True, **options
            )
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
    if issubclass(kind, transformers.PreTrainedModel):
        about["unexpected_keys"] = ()  # only the encoder of a whole model is loaded
    about["not_finite"] = not_finite(model)
    for key, wrong in (
        ("missing_keys", "missing"),
        ("mismatched_keys", "of another shape than its config.json says"),
        ("unexpected_keys", "not this model's"),
        ("not_finite", "with values that are not finite"),
    ):
        if found := sorted(map(str, about.get(key, ()))):
            where = f"backbone {source}: its {part}/" if part else str(source)
            raise ValueError(f"{where}: {amount(len(found), 'weight')} {wrong}, for instance {found[0]}")
    return model


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights with a NaN or an infinity; a sum, which is several times quicker, exempts most of them."""
    weights = ((name, x) for name, x in model.state_dict().items() if x.is_floating_point() and not x.is_meta)
    return [name for name, x in weights if not x.sum(dtype=torch.float32).isfinite() and not x.isfinite().all()]


def read_config(backbone: str | Path, part: str, name: str = "config.json") -> dict[str, Any]:
    """A diffusers configuration in a local folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything but a JSON object with a class name.
    """
    path = Path(backbone) / part / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = read_json(path)
    if not isinstance(content.get("_class_name"), str):
        raise ValueError(f"{path}: no configuration of diffusers: it has no _class_name")
    return content


def _hubs_reason(error: BaseException) -> str | None:
    """Why the hub gave nothing, which diffusers and transformers hide behind "does not appear to have a file"."""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(cause)
    for link in links:
        if isinstance(link, OSError) and link.filename and link.errno:
            return f"{link.filename}: {link.strerror} (where downloads are kept follows HF_HOME)"
    names = {base.__name__ for link in links for base in type(link).__mro__}
    if "RepositoryNotFoundError" in names or "GatedRepoError" in names:
        return "it knows no such repository, or one that needs a login (hf auth login)"
    if "LocalEntryNotFoundError" in names or "OfflineModeIsEnabled" in names:
        why = " ".join(str(links[-1]).split())[:200]
        return f"it cannot be reached ({why}), and nothing of it was downloaded before"
    return None


@contextmanager
def saving(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a model into; it replaces `folder` once complete.

    A kill leaves the old model or the new one, never half of one, and files follow the umask, whereas safetensors
    makes them readable only by their owner. Other files in `folder` stay.

    Yields:
        The existing folder to write into.

    Raises:
        OSError: when it cannot be written, for example on a full disk; `folder` is unchanged.
    """
    try:
        with replacing_folder(Path(folder), last=_FIRST_READ) as new:
            yield new
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


@dataclass(frozen=True)
class WeightsHeader:
    """What the headers of a `.safetensors` file, or of all its shards, say of its tensors.

    Attributes:
        path: the file that a user named.
        files: the file, or every shard in order.
        shapes: shape of each tensor by name.
        dtypes: dtype of each tensor as the format spells it, such as "BF16" or "F8_E4M3".
        metadata: further entries of the headers.
    """

    path: Path
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class KnownWeights:
    """What a weights file holds of a family of backbones, see `Backbone.recognise`.

    Attributes:
        family: the family's `name`.
        part: "transformer", "vae" or "text_encoder".
        layout: whose names the tensors have: "diffusers", "transformers", or "original", the family's own code's.
        prefix: what stands before every name, such as "model.diffusion_model."; mostly empty.
        sizes: the part's configuration as far as shapes, and a configuration in or beside the file, tell.
        names: name of each tensor in the file by its name in the module.
        refusal: why it cannot be used here and what could, in one line; None for what is taken.
        config_file: the `config.json` beside the file that gave some of the sizes; None where shapes gave all.
    """

    family: str
    part: str
    layout: str
    prefix: str
    sizes: Mapping[str, Any]
    names: Mapping[str, str] = field(repr=False)
    refusal: str | None = None
    config_file: Path | None = None


def read_header(path: str | Path) -> WeightsHeader:
    """Names, shapes and dtypes of the tensors in a `.safetensors` file; no tensor is read.

    Args:
        path: the file. One shard (`...-00001-of-00002.safetensors`) stands for all of them, and so does their index
            (`....safetensors.index.json`).

    Raises:
        FileNotFoundError: when it, or one of its shards, does not exist.
        ValueError: for another kind of file, or one that was cut short.
    """
    path = Path(path)
    files, shapes, dtypes = shards_of(path), dict[str, tuple[int, ...]](), dict[str, str]()
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                metadata |= content.metadata() or {}
                for name in content.keys():  # noqa: SIM118  # no mapping: it has no iterator
                    if name in shapes:
                        raise ValueError(f"{file}: holds {name}, as another shard does")
                    part = content.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), str(part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file}: {_not_safetensors(file, error)}") from error
    return WeightsHeader(path, files, shapes, dtypes, metadata)


def shards_of(path: Path) -> tuple[Path, ...]:
    """The files that a weights file stands for: itself, or all shards where it is one of them or their index.

    Raises:
        FileNotFoundError: when one does not exist.
        ValueError: for an index that lists no files.
    """
    if path.name.endswith(_INDEX):
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(x, str) for x in listed.values()):
            raise ValueError(f"{path}: expected the index of shards, with their names in its weight_map")
        files = tuple(path.parent / name for name in sorted(set(listed.values())))
    elif shard := _SHARD.fullmatch(path.name):
        count = int(shard[3])
        files = tuple(path.parent / f"{shard[1]}-{i:05d}-of-{shard[3]}.safetensors" for i in range(1, count + 1))
    else:
        files = (path,)
    for file in files:
        if not file.is_file():
            what = "no such file" if len(files) == 1 else f"no such file; {path.name} is one of {len(files)} shards"
            raise FileNotFoundError(f"{file}: {what}")
    return files


def weights_file(folder: Path) -> Path | None:
    """A model folder's `.safetensors` file, or the first of its shards; None where there is none."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != BRANCH_WEIGHTS)
    usual = [file for file in files if file.stem in ("diffusion_pytorch_model", "model")]
    return next(iter(usual or files), None)


def odd_weights(shapes: Mapping[str, tuple[int, ...]], module: nn.Module) -> dict[str, list[str]]:
    """Names of a model's weights that files lack, do not need or have in another shape; nothing for what fits.

    Args:
        shapes: of the tensors in the files.
        module: the model; may be without values (on the device "meta").
    """
    tied = getattr(module, "_tied_weights_keys", None) or ()  # saved once
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = {
        "missing": sorted(name for name in wanted.keys() - shapes.keys() if name not in tied),
        "not used": sorted(shapes.keys() - wanted.keys()),
        "other shapes": sorted(name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]),
    }
    return {what: names for what, names in found.items() if names}


def _not_safetensors(file: Path, error: SafetensorError) -> str:
    """What a file is that the format's library does not open."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if not start:
        return "empty"
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a pickle of PyTorch (.pth), which is not read; expected a .safetensors file or a diffusers folder"
    if start == b"GGUF":
        return "quantised weights (GGUF); expected a .safetensors file with float32, float16 or bfloat16 weights"
    return f"not a safetensors file, or cut short: {' '.join(str(error).split())[:120]}"


def weights_digest(module: nn.Module, *configuration: str) -> str:
    """SHA-256 of a module's weights, as float32, and of its configuration."""
    digest = hashlib.sha256("\0".join(configuration).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
