"""LoRA files: their weights, and the configuration or header that says at which scale they act."""

from __future__ import annotations

import errno
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, list_repo_files, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
# The names that diffusers and PEFT give a LoRA's weights, and other files of training folders.
_OWN_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_OTHERS = re.compile(r"scheduler|optimizer|checkpoint")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Header entries that hold a LoRA's configuration: diffusers', and finetrainers'.
_HEADER = ("lora_adapter_metadata", "lora_config")

# Keys of PEFT's configuration that say where the weights came from or how they were trained.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "ensure_weight_tying",
    "eva_config",
}  # fmt: skip
_HONOURED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
}  # fmt: skip
# PEFT's other kinds that are honoured: names for messages, and keys that say how their factors came about.
_KINDS = {"LORA": "LoRA", "LOKR": "LoKr", "LOHA": "LoHa"}
_IDLE_FACTORS = {
    "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "decompose_both", "decompose_factor",
    "use_effective_conv2d",
}  # fmt: skip
# Other keys may have a value that means "not used".
_UNUSED: tuple[Any, ...] = (None, False, {}, [], "")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": (*_KINDS, None),
    "bias": ("none", None),
    # The others (pissa, olora, loftq, corda ...) remove a part of the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class LoraConfiguration:
    """What PEFT's configuration says about scales.

    Attributes:
        rank: rank of every layer that no pattern names.
        alpha: likewise.
        rslora: scale layers by alpha / sqrt(rank) instead of alpha / rank.
        ranks: other ranks by pattern of the layer's name, as PEFT matches it.
        alphas: other alphas by pattern.
        dora: the weights hold a magnitude per layer.
        biases: the weights hold a bias per layer.
        where: file it was read from, for messages.
        kind: LoRA, LoKr or LoHa.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dora: bool
    biases: bool
    where: str = field(compare=False)
    kind: str = "LoRA"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA before it is fitted to a transformer.

    Attributes:
        name: name for messages.
        tensors: tensors under the file's names.
        configuration: None when only the tensors say anything.
        trained_scale: ss_network_alpha / ss_network_dim of a kohya trainer's header; None without them. Their tensors
            say the scale; this one tells whether those are missing.
        given_scale: the scale that its makers give elsewhere, for a file that says none.
    """

    name: str
    tensors: Mapping[str, Tensor]
    configuration: LoraConfiguration | None = None
    trained_scale: float | None = None
    given_scale: float | None = None


def read_lora(
    source: str | Path | Mapping[str, Tensor] | LoraFile,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> LoraFile:
    """Read a LoRA with its configuration: PEFT's `adapter_config.json` beside the weights, or the file's header.

    Args:
        source: file, folder, hub id or the weights themselves. A `.safetensors` file, or a pickle that holds
            nothing but tensors.
        weight_name: file in a folder or on the hub; needed where there are several candidates.
        subfolder: subfolder of a folder or on the hub.
        hub: options of `hf_hub_download`.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it is no LoRA, or its configuration requires what cannot be honoured.
    """
    if isinstance(source, LoraFile):
        return source
    if isinstance(source, Mapping):
        return LoraFile("weights", dict(source))
    name, path = str(source), Path(source)
    if path.is_dir():
        path = _pick(path / (subfolder or ""), weight_name, name)
    elif not path.is_file():
        path = _from_hub(name, weight_name, subfolder, hub)
    if beside(path, "expert.json") is not None:
        raise ValueError(f"LoRA {name}: is an expert of LuVe (expert.json lies there); load it as an expert")
    if _SHARD.search(path.name):
        raise ValueError(f"LoRA {name}: {path.name} is one of several parts; expected one file that holds them all")
    tensors, header, trained, alone = _read(path, name)
    config = beside(path, ADAPTER_CONFIG)
    if config is not None:
        header.append((str(config), _text(config)))
    found = [_configuration(_json(text, where), where) for where, text in header]
    if not found and alone is not None:
        found = [_configuration(alone, f"{path}'s header")]
    for other in found[1:]:
        if other != found[0]:
            raise ValueError(f"LoRA {name}: {other.where} and {found[0].where} give it different scales")
    return LoraFile(name, tensors, found[0] if found else None, trained)


def beside(path: str | Path, name: str) -> Path | None:
    """The file of this name beside another, or beside the file that it links to; None when there is none."""
    places = (Path(path).parent, Path(path).resolve().parent)
    return next((place / name for place in places if (place / name).exists()), None)


def _pick(folder: Path, weight_name: str | None, name: str) -> Path:
    """The only weight file in a folder."""
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise FileNotFoundError(f"LoRA {name}: no {weight_name} in {folder}")
        return folder / weight_name
    if not folder.is_dir():
        raise FileNotFoundError(f"LoRA {name}: no folder {folder}")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return folder / _pick_name(files, name)


def _pick_name(files: list[str], name: str) -> str:
    for suffixes in ((".safetensors",), _PICKLES):
        found = [file for file in files if file.endswith(suffixes) and not _OTHERS.search(file)]
        own = [file for file in found if Path(file).name in _OWN_NAMES]
        if len(own or found) == 1:
            return (own or found)[0]
        if len(own or found) > 1 and all(_SHARD.search(file) for file in found):
            raise ValueError(
                f"LoRA {name}: is cut into {len(found)} parts ({', '.join(found[:3])}); expected one file that holds "
                "them all"
            )
        if found:
            raise ValueError(
                f"LoRA {name}: holds {len(found)} files of weights ({', '.join(found[:3])}): give the one that is meant"
            )
    raise FileNotFoundError(f"LoRA {name}: no .safetensors file there")


def _from_hub(name: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"LoRA {name}: no such file or folder")
    hub.pop("use_safetensors", None)
    folder = f"{subfolder}/" if subfolder else ""
    try:
        if weight_name is None:
            asked = {key: hub[key] for key in ("revision", "token") if key in hub}
            files = [f.removeprefix(folder) for f in list_repo_files(name, **asked) if f.startswith(folder)]
            weight_name = _pick_name([file for file in files if "/" not in file], name)
        path = Path(hf_hub_download(name, folder + weight_name, **hub))
        config = (Path(folder + weight_name).parent / ADAPTER_CONFIG).as_posix()
        try:
            hf_hub_download(name, config, **hub)
        except LocalEntryNotFoundError:
            known = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
            # None: neither present nor known to be missing.
            if try_to_load_from_cache(name, config, **known) is None:
                raise
        except EntryNotFoundError:
            pass
    except (OSError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"LoRA {name}: no such file or folder, and it is not available from the hub: {_line(error)}"
        ) from error
    return path


def _read(
    path: Path, name: str
) -> tuple[dict[str, Tensor], list[tuple[str, str]], float | None, dict[str, Any] | None]:
    """A file's tensors, and what its header says: configurations with their places, kohya's scale, alpha alone."""
    if path.stat().st_size == 0:
        raise ValueError(f"LoRA {name}: {path} is empty")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except SafetensorError as error:
        if path.suffix == ".safetensors" or not _is_pickle(path):
            raise ValueError(
                f"LoRA {name}: {path} is not a safetensors file, or was cut short: {_line(error)}"
            ) from error
        return _unpickle(path, name), [], None, None
    found = [(f"{path}'s header", header[key]) for key in _HEADER if header.get(key)]
    return tensors, found, _trained_scale(header), _alone(header, tensors)


def _alone(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """PEFT's keys of a header that holds them as entries of their own; a rank that it lacks is that of the tensors."""
    if "lora_alpha" not in header:
        return None
    given: dict[str, Any] = {key: _number(header[key]) for key in ("r", "lora_alpha") if key in header}
    for other in ("lora_rank", "rank"):
        if other in header:
            given.setdefault("r", _number(header[other]))
    ranks = {len(t) for key, t in tensors.items() if re.search(r"\.lora_(A|down)\.", key) and t.ndim}
    if "r" not in given and len(ranks) == 1:
        given["r"] = ranks.pop()
    return given


def _number(text: str) -> int | float | str:
    try:
        return int(float(text)) if float(text).is_integer() else float(text)
    except (ValueError, OverflowError):
        return text


def _trained_scale(header: Mapping[str, str]) -> float | None:
    """Alpha / dim of a kohya trainer's header; None where it says no numbers."""
    try:
        alpha, dim = (float(header[f"ss_network_{key}"]) for key in ("alpha", "dim"))
        return alpha / dim
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _unpickle(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a pickle, read by an unpickler that runs nothing."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # EINVAL comes from a seek before the start: the file is cut short.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        blocked = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", str(error))
        reason = (
            f"it asks for {blocked[1] or blocked[2]}" if blocked else "it holds more than tensors, or was cut short"
        )
        raise ValueError(
            f"LoRA {name}: {path} is a pickle that is not loaded ({reason}); expected a .safetensors file"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"LoRA {name}: {path} is a pickle of something else than tensors by name")
    return dict(content)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the LoRA's configuration is not JSON: {_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected the LoRA's configuration to be a JSON object")
    # diffusers' header names the component before each key.
    return {key.removeprefix("transformer."): value for key, value in content.items()}


def _configuration(content: Mapping[str, Any], where: str) -> LoraConfiguration:
    """Check a PEFT LoRA's configuration: every key is honoured, without effect here, or refused."""
    factors = content.get("peft_type") in ("LOKR", "LOHA")
    idle = _IDLE | _IDLE_FACTORS if factors else _IDLE
    alpha_key = "alpha" if factors else "lora_alpha"
    honoured = _HONOURED - {"lora_alpha", "use_rslora", "use_dora", "lora_bias"} | {alpha_key} if factors else _HONOURED
    for key, value in sorted(content.items(), key=lambda item: item[0] != "peft_type"):  # its type first
        allowed = _PLAIN.get(key, _UNUSED)
        if key not in idle | honoured and not any(value == v and type(value) is type(v) for v in allowed):
            raise ValueError(f"{where}: {key} is {json.dumps(value)}, which cannot be honoured: the LoRA is refused")
    flags = {key: content.get(key) or False for key in ("use_rslora", "use_dora", "lora_bias")}
    rank, alpha = content.get("r"), content.get(alpha_key)
    patterns = {key: content.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    wrong = [key for key, value in flags.items() if not isinstance(value, bool)]
    wrong += [key for key, value in patterns.items() if not _is_pattern(value, whole=key == "rank_pattern")]
    wrong += [] if _is_number(rank, whole=True) else ["r"]
    wrong += [] if _is_number(alpha) else [alpha_key]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]}: no value of PEFT's: {json.dumps(content.get(wrong[0]))}")
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return LoraConfiguration(
        rank, float(alpha), flags["use_rslora"], patterns["rank_pattern"], patterns["alpha_pattern"],
        flags["use_dora"], flags["lora_bias"], where, _KINDS[content.get("peft_type") or "LORA"],
    )  # fmt: skip


def _is_pattern(value: Any, whole: bool) -> bool:
    if not isinstance(value, dict):
        return False
    try:
        return all(_is_number(number, whole) and re.compile(key) for key, number in value.items())
    except re.error:
        return False


def _is_number(value: Any, whole: bool = False) -> bool:
    """Whether it is a finite number other than 0, at which a LoRA would do nothing; a rank is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return isinstance(value, int) and value >= 1 if whole else value != 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
