"""`luve inspect`: what files and folders of weights are, by their names and headers."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luve_lightning.callbacks.checkpoint_io import describe_checkpoint, header_of, read_pickle
from luve_lightning.cascade.lora_files import ADAPTER_CONFIG, read_lora
from luve_lightning.cascade.lora_layers import fit_lora
from luve_lightning.cascade.lora_names import describe_lora, parse_name
from luve_lightning.cascade.pipeline_files import expert_folders
from luve_lightning.cli import Verb
from luve_lightning.cli.errors import legible
from luve_lightning.data.latent_store import describe_entry, describe_store
from luve_lightning.data.video_files import GIT_LFS, kind_of_file
from luve_lightning.files import find_json, read_json
from luve_lightning.model_folders import BRANCH_WEIGHTS, WeightsHeader, odd_weights, read_header, weights_file
from luve_lightning.models.attention import saved_attention
from luve_lightning.models.backbones import REFINEMENT_KEY, Denoiser, denoiser_of, empty_denoiser, families, recognise
from luve_lightning.models.experts import ADAPTER_WEIGHTS, EXPERT, describe_expert
from luve_lightning.models.vluer import BaseVLUer, ReleasedVLUer
from luve_lightning.models.vluer.released import buffer_names, state_mismatch
from luve_lightning.terminal import amount

VERBS = {"inspect": Verb("Generation", "say what files and folders of weights are", positional="paths...")}

_TRANSFORMER = "as --refiner or --transformer, or the backbone of a task that needs a transformer alone"
_SHOWN = 3  # names of examples
_WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


@dataclass
class Found:
    """What a path is.

    Attributes:
        path: as it was given.
        kind: what it is, in a few words.
        facts: more of it, in the order to print.
        damaged: whether it cannot be read.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    damaged: bool = False

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        for name, value in self.facts.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"  {name:<14} {legible(shown)}")
        return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def inspect(paths: list[Path], backbone: str | None = None, json: bool = False) -> None:
    """Says what files and folders of weights are: family, layout, ranks, scales, and what of them LuVe uses.

    Names, shapes and headers are read. Values are read only of LoRAs, which are small and whose scales are values; a
    pickle runs no code. The exit code is 0 for whatever could be told, also that something is unknown, and 2 where a
    path does not exist or a file is damaged.

    Args:
        paths: Files and folders: backbones, transformers, VAEs, text encoders, VLUers, experts, LoRAs, checkpoints,
            stores of latents; anything else is told as such.
        backbone: Backbone folder or hub id for which LoRAs are judged: whether every layer fits it.
        json: Print a JSON list of {path, kind, facts, damaged}.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{missing[0]}: no such file or folder")
    denoiser = None if backbone is None else empty_denoiser(backbone)
    found = [one for path in paths for one in (_folder(path) if path.is_dir() else [_file(path)])]
    for one in found:
        if denoiser is not None and one.kind == "LoRA":
            one.facts |= _in_backbone(Path(one.path), denoiser, str(backbone))
    print(dumps([asdict(one) for one in found], indent=2) if json else "\n\n".join(map(str, found)))
    damaged = [one for one in found if one.damaged]
    if damaged:
        raise ValueError(f"{damaged[0].path}: {damaged[0].kind}: {next(iter(damaged[0].facts.values()))}")


@dataclass(frozen=True)
class _Model:
    """A model by its configuration: class, what it is, where it is used, and how to build it."""

    name: str
    kind: str
    use: str
    facts: dict[str, Any]
    build: Callable[[], nn.Module]


def _guarded(path: Path, look: Callable[[Path], Found | None]) -> Found | None:
    """What `look` finds; damage where reading fails."""
    try:
        return look(path)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        reason = text.removeprefix(f"{path}: ") or type(error).__name__
        return Found(str(path), "damaged", {"why": reason}, damaged=True)


def _folder(path: Path) -> list[Found]:
    if not any(path.iterdir()):
        return [Found(str(path), "empty folder", {"used": "nowhere"})]
    looks: tuple[tuple[bool, Callable[[Path], Found | None]], ...] = (
        ((path / "model_index.json").is_file(), _backbone),
        ((path / EXPERT).is_file(), _expert),
        ((path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file(), _lora),
        ((path / "config.json").is_file(), _component),
        (any((path / part / "config.json").is_file() for part in ("transformer", "vae", "text_encoder")), _backbone),
        (any(path.glob("[0-9a-f][0-9a-f]/" + "[0-9a-f]" * 64 + ".safetensors")), _store),
        ((path / "scheduler_config.json").is_file(), _scheduler),
        ((path / "tokenizer_config.json").is_file(), _tokenizer),
    )
    for is_there, look in looks:
        if is_there and (found := _guarded(path, look)) is not None:
            return [found]
    if any(path.glob(f"*/{EXPERT}")):
        return [one for folder in expert_folders(path).values() for one in _folder(folder)]
    weights = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _WEIGHTS)
    if len(weights) == 1:
        return [_file(weights[0])]
    below = sorted(file for file in islice(path.rglob("*"), 10_000) if file.suffix in _WEIGHTS)
    kinds = Counter(file.suffix or "without a suffix" for file in path.iterdir() if file.is_file())
    facts: dict[str, Any] = {"files": [f"{number} {suffix}" for suffix, number in kinds.most_common(5)] or "none"}
    if below:
        facts["weights below"] = [str(file.relative_to(path)) for file in below[:_SHOWN]]
        facts["hint"] = "give one of them, or its folder"
    return [Found(str(path), "unknown folder", facts)]


def _backbone(path: Path) -> Found:
    """A pipeline folder, or one with some of its parts."""
    index = find_json(path / "model_index.json")
    facts: dict[str, Any] = {"pipeline": index.get("_class_name", "none: no model_index.json")}
    strange, odd = [], []
    for folder in sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")):
        part = next(iter(_folder(folder)), None)
        if folder.name == "experts" and part is not None:
            facts["experts"] = list(map(str, expert_folders(folder)))
        elif part is not None and part.kind.startswith("unknown"):
            strange.append(f"{folder.name}/")
        elif part is not None:
            facts[folder.name] = _brief(part)
            odd += [folder.name] * (part.damaged or str(part.facts.get("used")).startswith(("nowhere", "not known")))
    missing = [k for k, v in index.items() if isinstance(v, list) and None not in v and not (path / k).is_dir()]
    facts |= {k: v for k, v in (("missing", missing), ("incomplete", odd), ("not used", strange)) if v}
    whole = not odd and {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= facts.keys()
    facts["used"] = "as --backbone" if whole else "as far as a command needs these parts alone, such as --refiner"
    return Found(str(path), "backbone" if whole else "parts of a backbone", facts)


def _brief(part: Found) -> str:
    """A part in one line of its backbone."""
    keys = ("class", "sizes", "shift", "weights", "attention", "missing", "not used", "why")
    return ", ".join([part.kind] * part.damaged + [str(part.facts[key]) for key in keys if key in part.facts])


def _model_of(config: Mapping[str, Any]) -> _Model | None:
    """The model that a configuration is of; None for one that LuVe does not use."""
    name = str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    vluer = next((kind for kind in BaseVLUer.__subclasses__() if kind.__name__ == name), None)
    if vluer is not None:
        use = "as --vluer, by luve upsample, and to train on from"
        sizes = {key: value for key, value in config.items() if key in vluer._get_init_keys(vluer)}
        return _Model(name, "VLUer", use, {}, lambda: vluer(**sizes))
    family = next((family for family in families() if name in family.class_names), None)
    if family is None:
        return None
    part = "text_encoder" if config.get("architectures") else "vae"
    part = "transformer" if name == family.denoiser_class.module_class.__name__ else part
    use = _TRANSFORMER if part == "transformer" else f"as a backbone's {part}/"
    kind = "VAE" if part == "vae" else part.replace("_", " ")
    return _Model(name, kind, use, {"family": family.name}, lambda: family.from_config(part, config))


def _component(path: Path) -> Found | None:
    """A model's folder: its configuration, and whether the weights are those that it requires."""
    config = read_json(path / "config.json")
    weights, model = weights_file(path), _model_of(config)
    if model is None:
        return None if weights is None else replace(_safetensors(weights), path=str(path))
    kind, facts = model.kind, {"class": model.name} | model.facts
    module = _built(model, path)
    if kind == "transformer":
        facts |= _about_transformer(denoiser_of(module), config, path)
    elif kind == "VLUer":
        facts["config"] = [f"{key} {value}" for key, value in config.items() if not key.startswith("_")]
    if weights is None:
        return Found(str(path), f"{kind} without weights", facts | {"used": "not known: no .safetensors file there"})
    header = read_header(weights)
    branches = read_header(path / BRANCH_WEIGHTS).shapes if (path / BRANCH_WEIGHTS).is_file() else {}
    facts |= _tensors(header) | {
        key: _examples(names) for key, names in odd_weights({**header.shapes, **branches}, module).items()
    }
    if kind == "transformer" and (path / "lora" / ADAPTER_WEIGHTS).is_file():
        facts["lora"] = "lora/, merged into these weights already"
    fits = not facts.keys() & {"missing", "other shapes"} and ("not used" not in facts or kind == "text encoder")
    why = "nowhere: refused, since the weights are not those of the configuration"
    facts["used"] = facts.pop("used", model.use) if fits else why
    return Found(str(path), kind, facts)


def _built(model: _Model, path: Path) -> nn.Module:
    """The model without values."""
    try:
        with torch.device("meta"):
            return model.build()
    except Exception as error:  # anything at all: libraries divide by sizes and unpack them unchecked
        raise ValueError(f"its config.json makes no {model.name}: {type(error).__name__}: {error}") from error


def _about_transformer(denoiser: Denoiser, config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Sizes and attention of a transformer, and why it is used nowhere, if so."""
    denoiser.use_attention(saved_attention(config, path))
    patch = " x ".join(map(str, denoiser.patch))
    layers, heads = amount(len(denoiser.blocks), "layer"), amount(denoiser.heads, "head")
    facts = {"sizes": f"{layers}, {heads}, text {denoiser.text_dim}, patch {patch}"}
    try:
        facts["sizes"] += f", {denoiser.channels} latent channels"
    except ValueError as error:  # for image to video
        facts["used"] = f"nowhere: {error}"
    facts |= {"used": f"as --refiner, with --refinement {config[REFINEMENT_KEY]}"} if REFINEMENT_KEY in config else {}
    return facts | ({} if denoiser.attention is None else {"attention": str(denoiser.attention)})


def _scheduler(path: Path) -> Found:
    config = read_json(path / "scheduler_config.json")
    shift = f"shift {config.get('flow_shift') or config.get('shift') or 1.0:g}"
    return Found(str(path), "scheduler", {"class": config.get("_class_name"), "shift": shift})


def _tokenizer(path: Path) -> Found:
    name = read_json(path / "tokenizer_config.json").get("tokenizer_class")
    return Found(str(path), "tokenizer", {"class": name})


def _store(path: Path) -> Found:
    kind, facts = describe_store(path)
    return Found(str(path), kind, facts | {"used": "as the store of a datamodule"})


def _expert(path: Path) -> Found:
    facts, header = describe_expert(path), read_header(path / ADAPTER_WEIGHTS)
    facts |= _tensors(header)
    facts["used"] = f"as --experts.{facts['name']}, on the transformer of its training"
    return Found(str(path), "expert", facts)


def _file(path: Path) -> Found:
    if path.stat().st_size == 0:
        return Found(str(path), "empty file", {"size": "0 bytes"}, damaged=True)
    with path.open("rb") as stream:
        start = stream.read(4096)
    if path.suffix == ".safetensors" and (path.parent / EXPERT).is_file() and path.name == ADAPTER_WEIGHTS:
        look: Callable[[Path], Found | None] = lambda file: replace(_expert(file.parent), path=str(file))  # noqa: E731
    elif path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") or start[8:10] == b'{"':
        look = _other if kind_of_file(path)[0] == GIT_LFS else _safetensors
    else:
        look = _pickle if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") else _other
    found = _guarded(path, look)
    assert found is not None
    return found


def _safetensors(path: Path) -> Found:
    header = read_header(path)
    if "key" in header.metadata and len(header.shapes) == 1:
        kind, entry = describe_entry(path)
        return Found(str(path), kind, entry | {"used": "by its store, the folder above"})
    beside = find_json(path.parent / "config.json")
    known = recognise(header)
    own = beside and (known is None or known.layout != "original") and weights_file(path.parent) == path
    if own and _model_of(beside) is not None and (found := _component(path.parent)) is not None:
        return replace(found, path=str(path))
    return _told(header)


def _told(header: WeightsHeader) -> Found:
    """A file of weights by its names: a backbone's part, a LoRA, or unknown."""
    path, known = header.path, recognise(header)
    if known is None:
        return _lora(path) or _unknown(path, list(header.shapes), _tensors(header))
    facts: dict[str, Any] = {"family": known.family, "layout": f"{known.layout} names"}
    facts |= {"prefix": known.prefix} if known.prefix else {}
    facts |= {"sizes": [f"{key} {value}" for key, value in known.sizes.items()]} if known.sizes else {}
    use = f"nowhere: {known.refusal}" if known.refusal else _TRANSFORMER
    kind = "VAE" if known.part == "vae" else known.part.replace("_", " ")
    return Found(str(path), kind, facts | _tensors(header) | {"used": use})


def _unknown(path: Path, names: Sequence[str], shown: Mapping[str, Any]) -> Found:
    return Found(str(path), "unknown weights", {**shown, "first keys": list(names[:5]), "used": "nowhere"})


def _lora(path: Path) -> Found | None:
    """A LoRA, also one whose configuration or layout is refused; None for other weights."""
    weights = next(path.glob(ADAPTER_WEIGHTS), weights_file(path) or path) if path.is_dir() else path
    try:
        file = read_lora(path)
    except ValueError as error:
        if weights.suffix == ".safetensors" and not any(map(parse_name, read_header(weights).shapes)):
            return None
        return Found(str(path), "LoRA", {"used": f"nowhere: {error}"})
    about = describe_lora(file)
    if not about.layers:
        return None
    facts: dict[str, Any] = {
        "names": about.writers,
        "layers": f"{about.layers}" + (f" in {about.blocks} blocks" if about.blocks else ""),
        "updates": [f"{number} {kind}" for kind, number in about.kinds.items()],
        "rank": about.ranks or "none",
        "scale": [f"{scale:g}" for scale in about.scales] or ["1"],
        "scale from": about.scale_from,
    }
    facts |= {"unknown": _examples(about.unknown)} if about.unknown else {}
    facts |= _tensors(header_of(path, file.tensors))
    facts["used"] = f"nowhere: {about.refused}" if about.refused else "as --lora, on a transformer that has its layers"
    return Found(str(path), "LoRA", facts)


def _in_backbone(path: Path, denoiser: Denoiser, backbone: str) -> dict[str, str]:
    """Whether a LoRA fits a backbone, for its facts."""
    try:
        return {"used": f"as --lora with {backbone}: {fit_lora(denoiser.module, read_lora(path)).summary}"}
    except ValueError as error:
        return {"used": f"not with {backbone}: {error}"}


def _pickle(path: Path) -> Found:
    try:
        content = read_pickle(path)  # only tensors and plain types
    except pickle.UnpicklingError:
        return Found(str(path), "pickle of code", {"used": "nowhere: only tensors and plain types are read"})
    if not isinstance(content, Mapping):
        return Found(str(path), f"pickle of a {type(content).__name__}", {"used": "nowhere"})
    if (facts := describe_checkpoint(content)) is not None:
        ours = facts["written by"] == "luve fit"
        use = "as --ckpt_path, with the configuration of its run" if ours else "nowhere"
        return Found(str(path), "checkpoint", facts | _tensors(header_of(path, content["state_dict"])) | {"used": use})
    model = content.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("sd"), Mapping):
        return _released(path, content, model)
    header = header_of(path, content)
    if header.shapes and len(header.shapes) == len(content):
        found = _told(header)
        if found.facts["used"] == _TRANSFORMER:
            found.facts["used"] = "nowhere: a pickle; expected a .safetensors file"
        return found
    return _unknown(path, list(map(str, content)), {"entries": len(content)})


def _released(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> Found:
    state = model["sd"]
    with torch.device("meta"):
        net = ReleasedVLUer()
    wanted = {name for name, _ in net.named_parameters()} | set(buffer_names(net))
    facts: dict[str, Any] = {"model": str(model.get("name")), "iteration": content.get("iter")}
    facts |= _tensors(header_of(path, state))
    odd = {"missing": sorted(wanted - state.keys()), "unknown": sorted(map(str, state.keys() - wanted))}
    facts |= {key: _examples(names) for key, names in odd.items() if names}
    if beside := [str(key) for key in content if key not in ("model", "iter")]:
        facts["not used"] = beside
    facts["licence"] = "none in the file; its network builds on VRT, CC-BY-NC-4.0"
    wrong = "not the released VLUer's names" if any(odd.values()) else state_mismatch(state, net)
    facts["used"] = f"nowhere: {wrong}" if wrong else "by luve convert vluer"
    return Found(str(path), "file in the released VLUer's layout" if wrong else "released VLUer's file", facts)


def _other(path: Path) -> Found:
    kind, facts = kind_of_file(path)
    if kind == GIT_LFS:
        raise ValueError(f"{kind}: the file itself was not downloaded (git lfs pull)")
    return Found(str(path), kind, {"size": _bytes(path.stat().st_size), **facts, "used": "not as weights"})


def _tensors(header: WeightsHeader) -> dict[str, str]:
    numbers = sum(map(math.prod, header.shapes.values()))
    kinds = " and ".join(kind for kind, _ in Counter(header.dtypes.values()).most_common())
    return {"weights": f"{len(header.shapes):,} tensors, {numbers:,} numbers, {kinds}"}


def _examples(names: Sequence[str]) -> str:
    return f"{len(names):,} tensor{'s' * (len(names) != 1)}, for instance {', '.join(names[:_SHOWN])}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
