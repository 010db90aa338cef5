"""A LoRA's tensors fitted to a transformer: each gets its layer and scale, or the whole LoRA is refused."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luve_lightning.cascade.lora_files import ADAPTER_CONFIG, LoraConfiguration, LoraFile
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts import expert_names, experts_set_aside

# Prefixes that wrappers and trainers put before a layer's name.
_WRAPPER = re.compile(
    r"^(?:base_model\.model\.|pipe\.dit\.|dit\.|module\.|model\.|_orig_mod\.|transformer\.|diffusion_model\.)+"
)
_PEFT = "base_model.model."
_KOHYA = re.compile(r"^lora_unet[_.]+")
# Ends of names, and the part of the layer that they mean. `adapter` is PEFT's name of the adapter, which some
# leave in.
_PARTS = (
    ("A", re.compile(r"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.(?P<adapter>[^.]+))?\.weight$")),
    ("B", re.compile(r"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.(?P<adapter>[^.]+))?\.weight$")),
    ("bias", re.compile(r"\.lora_B(?:\.(?P<adapter>[^.]+))?\.bias$")),
    ("magnitude", re.compile(r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("difference", re.compile(r"\.diff_b$")),
)  # fmt: skip


@dataclass(frozen=True)
class LoraSummary:
    """What part of a LoRA acts, for people and records.

    Attributes:
        name: name of the LoRA.
        layers: number of layers that it changes.
        ranks: all ranks that occur, ascending.
        scales: all values of alpha / rank that occur, ascending; 1 where nothing gives alpha.
        dora: whether it holds magnitudes.
        biases: number of layers whose biases it changes.
        assumed: PEFT's weights without the file that gives their scale; taken as 1.
    """

    name: str
    layers: int
    ranks: list[int]
    scales: list[float]
    dora: bool = False
    biases: int = 0
    assumed: bool = False

    def __str__(self) -> str:
        more = ", DoRA" if self.dora else ""
        more += f", {self.biases} biases" if self.biases else ""
        more += f" (assumed: no {ADAPTER_CONFIG} beside it)" if self.assumed else ""
        return (
            f"LoRA {self.name}: {self.layers} layers, {_several('rank', self.ranks)}, "
            f"{_several('scale', self.scales)}{more}"
        )

    def record(self) -> dict[str, Any]:
        """The summary as JSON."""
        return asdict(self)


@dataclass
class _Layer:
    """The parts of one layer and their keys in the file; a configuration's patterns match `names`."""

    parts: dict[str, Tensor]
    keys: dict[str, str]
    names: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class FittedLora:
    """A LoRA for one transformer.

    Attributes:
        state_dict: PEFT's names with diffusers' prefix "transformer.".
        metadata: the arguments of PEFT's LoraConfig with the same prefix.
        scales: by module.
        summary: for people.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]
    scales: dict[str, float]
    summary: LoraSummary


def fit_lora(transformer: Any, file: LoraFile) -> FittedLora:
    """Give every tensor of a LoRA its place in the transformer.

    The names of diffusers, the family's own code (ComfyUI, DiffSynth-Studio) and kohya's trainers are known, for
    all layers or some. `W + scale * B A` with scale alpha / rank, from tensors `alpha` or the configuration; 1
    without either. The transformer has no experts' layers, but may have other LoRAs.

    Raises:
        ValueError: when a tensor has no place, does not fit, or lacks its counterpart; nothing is ever left out.
    """
    layers = _layers(denoiser_of(transformer), file)
    _scale(layers, file)
    dora = [name for name, layer in layers.items() if "magnitude" in layer.parts]
    if dora and len(dora) < len(layers):
        lacks = next(name for name in layers if name not in dora)
        raise ValueError(
            f"LoRA {file.name}: {len(dora)} of its {len(layers)} layers have DoRA's magnitude, {lacks} has none"
        )
    biases = [name for name, layer in layers.items() if {"bias", "difference"} & layer.parts.keys()]
    configured = file.configuration
    if configured is not None and configured.kind != "LoRA":
        raise ValueError(f"LoRA {file.name}: {configured.where} is of a {configured.kind}, the weights are a LoRA's")
    if configured is not None and configured.dora != bool(dora):
        raise ValueError(f"LoRA {file.name}: {configured.where} and the weights disagree on DoRA's magnitudes")
    if configured is not None and configured.biases and len(biases) < len(layers):
        raise ValueError(f"LoRA {file.name}: {configured.where} has lora_bias, and biases are missing in the weights")
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.parts["A"], layer.parts["B"]
        if dora:
            found[f"{name}.lora_magnitude_vector"] = layer.parts["magnitude"].flatten()
        if biases:  # PEFT has them in all layers or in none, and scales them
            zero = torch.zeros(len(layer.parts["B"]))
            bias = layer.parts.get("bias", zero) + layer.parts.get("difference", zero) / layer.scale
            found[f"{name}.lora_B.bias"] = bias
    ranks = {name: len(layer.parts["A"]) for name, layer in layers.items()}
    scales = {name: layer.scale for name, layer in layers.items()}
    exact = {f"^{re.escape(name)}": name for name in layers}
    settings = {
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(ranks.values())),
        "rank_pattern": {pattern: ranks[name] for pattern, name in exact.items()},
        "alpha_pattern": {pattern: scales[name] * ranks[name] for pattern, name in exact.items()},
        "target_modules": list(layers),
        "use_dora": bool(dora),
        "lora_bias": bool(biases),
    }
    alphas = any("alpha" in layer.parts for layer in layers.values())
    summary = LoraSummary(
        file.name,
        len(layers),
        sorted(set(ranks.values())),
        sorted(set(scales.values())),
        dora=bool(dora),
        biases=len(biases),
        assumed=configured is None and not alphas and any(key.startswith(_PEFT) for key in file.tensors),
    )
    return FittedLora(
        {f"transformer.{key}": tensor for key, tensor in found.items()},
        {f"transformer.{key}": value for key, value in settings.items()},
        scales,
        summary,
    )


def load_lora(transformers: Sequence[Any], file: LoraFile, adapter_name: str | None, pipeline: Any) -> LoraSummary:
    """Load a LoRA whole into every transformer, or into none; returns what was loaded, at which scale.

    The default of `adapter_name` is diffusers' choice; diffusers handles the offloading of `pipeline`.

    Raises:
        ValueError: for a LoRA that cannot be loaded whole.
    """
    fitted = []
    for transformer in transformers:  # all of them before the first is touched
        with experts_set_aside(transformer):
            fitted.append(fit_lora(transformer, file))
    for transformer, lora in zip(transformers, fitted, strict=True):
        with experts_set_aside(transformer), warnings.catch_warnings():
            there = set(getattr(transformer, "peft_config", {}))
            # Several adapters are intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            transformer.load_lora_adapter(
                dict(lora.state_dict),
                network_alphas=None,
                adapter_name=adapter_name,
                metadata=lora.metadata,
                _pipeline=pipeline,
            )
            (new,) = set(transformer.peft_config) - there
            _check_loaded(transformer, new, lora)
    return fitted[0].summary


def plain_loras(transformer: Any) -> list[str]:
    """Names of the transformer's adapters that are not experts."""
    experts = expert_names(transformer)
    return [name for name in getattr(transformer, "peft_config", {}) if name not in experts]


def _check_loaded(transformer: Any, adapter: str, fitted: FittedLora) -> None:
    """Assert that PEFT loaded a LoRA as fitted: the same layers at the same scales."""
    there = {
        name: module.scaling[adapter]
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
    assert there.keys() == fitted.scales.keys(), "PEFT took other layers"
    assert all(math.isclose(there[name], scale, rel_tol=1e-6) for name, scale in fitted.scales.items())


def _layers(denoiser: Denoiser, file: LoraFile) -> dict[str, _Layer]:
    """Every tensor under its module and part, all shapes checked."""
    modules = {
        name: module
        for name, module in denoiser.module.named_modules()
        if name and not re.search(r"\.(base_layer|lora_\w+)(\.|$)", name)
    }
    # Every name that a LoRA may use for a module, with underscores for dots as in kohya's trainers.
    places = {denoiser.original_name(name).replace(".", "_"): name for name in modules}
    places |= {name.replace(".", "_"): name for name in modules}
    layers: dict[str, _Layer] = {}
    strange: list[str] = []
    elsewhere: list[str] = []
    adapters: set[str] = set()
    for key, tensor in file.tensors.items():
        part, end = next(((part, found) for part, end in _PARTS if (found := end.search(key))), (None, None))
        if part is None or end is None:
            strange.append(key)
            continue
        if adapter := end.groupdict().get("adapter"):
            adapters.add(adapter)
        raw = key[: end.start()]
        short = _KOHYA.sub("", _WRAPPER.sub("", raw))
        name = places.get(short.replace(".", "_"))
        if name is None:
            elsewhere.append(short)
            continue
        own = (
            (name, denoiser.original_name(name))
            if _KOHYA.match(_WRAPPER.sub("", raw))
            else (raw.removeprefix(_PEFT), short)
        )
        layer = layers.setdefault(name, _Layer({}, {}, own))
        if part in layer.keys:
            raise ValueError(f"LoRA {file.name}: {layer.keys[part]} and {key} are the same part of {name}")
        layer.parts[part], layer.keys[part] = _checked(tensor, key, file.name), key
    _refuse_strangers(file, strange, elsewhere, len(layers), denoiser)
    if len(adapters) > 1:
        raise ValueError(f"LoRA {file.name}: holds several adapters: {', '.join(sorted(adapters))}")
    for name, layer in layers.items():
        _check_layer(file.name, name, layer, modules[name])
    # In the transformer's order: the same LoRA gives the same summary whatever the file's order.
    return {name: layers[name] for name in modules if name in layers}


def _refuse_strangers(
    file: LoraFile, strange: Sequence[str], elsewhere: Sequence[str], known: int, denoiser: Denoiser
) -> None:
    if not file.tensors or len(strange) == len(file.tensors):
        example = f", for instance {strange[0]}" if strange else ""
        kind = type(denoiser.module).__name__
        raise ValueError(f"LoRA {file.name}: holds no weights of a LoRA for a {kind}{example}")
    if strange:
        raise ValueError(
            f"LoRA {file.name}: {len(strange)} of its {len(file.tensors)} tensors are no parts of a plain LoRA and "
            f"cannot be honoured, for instance {', '.join(sorted(strange)[:3])}"
        )
    if elsewhere:
        unknown = sorted(set(elsewhere))
        raise ValueError(
            f"LoRA {file.name}: {len(unknown)} of its {known + len(unknown)} layers are not in this transformer of "
            f"{len(denoiser.blocks)} blocks, for instance {unknown[0]}"
        )


def _checked(tensor: Tensor, key: str, lora: str) -> Tensor:
    if not tensor.is_floating_point():
        if key.endswith(".alpha") and tensor.dtype in (torch.int32, torch.int64):
            return tensor.float()
        raise ValueError(f"LoRA {lora}: {key} is {tensor.dtype}, expected floating-point numbers")
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no arithmetic
    if not tensor.isfinite().all():
        raise ValueError(f"LoRA {lora}: {key} holds values that are not numbers")
    return tensor


def _check_layer(lora: str, name: str, layer: _Layer, module: nn.Module) -> None:
    """Check that both halves exist, each of the shape that the module needs."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(base, nn.Linear | nn.Conv3d):
        raise ValueError(
            f"LoRA {lora}: {name} is not a linear layer but a {type(base).__name__}: {layer.keys.popitem()[1]}"
        )
    for part, other in (("A", "B"), ("B", "A")):
        if part not in layer.parts:
            there = layer.keys.get(other) or next(iter(layer.keys.values()))
            raise ValueError(f"LoRA {lora}: {name} has {there} without its other half: the LoRA is incomplete")
    a, b, width = layer.parts["A"], layer.parts["B"], base.weight.shape
    rank, rank_b = len(a) if a.ndim else 0, b.shape[1] if b.ndim > 1 else 0
    if rank != rank_b or rank < 1:
        raise ValueError(f"LoRA {lora}: the halves of {name} have ranks {rank} and {rank_b}")
    linear = isinstance(base, nn.Linear)
    wanted = {
        "A": (rank, *width[1:]),
        "B": (width[0], rank) if linear else (width[0], rank, 1, 1, 1),
        "bias": (width[0],),
        "difference": (width[0],),
    }
    for part, shape in wanted.items():
        if part in layer.parts and tuple(layer.parts[part].shape) != shape:
            raise ValueError(
                f"LoRA {lora}: {layer.keys[part]} has shape {tuple(layer.parts[part].shape)}, "
                f"{name} of this transformer takes {shape}"
            )
    if "magnitude" in layer.parts and layer.parts["magnitude"].numel() != width[0]:
        raise ValueError(
            f"LoRA {lora}: {layer.keys['magnitude']} has {layer.parts['magnitude'].numel()} values, expected {width[0]}"
        )
    if "magnitude" in layer.parts and not linear:
        raise ValueError(f"LoRA {lora}: {name}: DoRA is honoured for linear layers only")


def _scale(layers: Mapping[str, _Layer], file: LoraFile) -> None:
    """Set each layer's scale."""
    configured = file.configuration
    used: set[str] = set()
    for name, layer in layers.items():
        alpha, rank = layer.parts.get("alpha"), len(layer.parts["A"])
        if alpha is not None:
            if alpha.numel() != 1 or not alpha.item():
                raise ValueError(f"LoRA {file.name}: {layer.keys['alpha']}: expected one number other than 0")
            layer.scale = alpha.item() / rank
        if configured is not None:
            scale = _configured_scale(configured, layer.names, rank, name, file.name, used)
            if alpha is not None and not math.isclose(scale, layer.scale, rel_tol=1e-6):
                raise ValueError(
                    f"LoRA {file.name}: {layer.keys['alpha']} scales {name} by {layer.scale:g}, "
                    f"{configured.where} by {scale:g}"
                )
            layer.scale = scale
    for pattern in () if configured is None else (*configured.ranks, *configured.alphas):
        if configured is not None and pattern not in used:
            raise ValueError(f"LoRA {file.name}: {configured.where}: the pattern {pattern!r} fits none of its layers")


def _configured_scale(
    configured: LoraConfiguration, names: Sequence[str], rank: int, layer: str, lora: str, used: set[str]
) -> float:
    """A layer's scale by PEFT's configuration, whose rank must be that of the weights."""
    values: list[float] = []
    for patterns, other in ((configured.ranks, configured.rank), (configured.alphas, configured.alpha)):
        # Like peft.utils.other.get_pattern_key: the first pattern that matches the name's end counts.
        hits = [p for p in patterns if any(re.match(rf"(.*\.)?({p})$", name) for name in names)]
        used.update(hits)
        values.append(patterns[hits[0]] if hits else other)
    if values[0] != rank:
        raise ValueError(
            f"LoRA {lora}: {layer} has rank {rank}, {configured.where} says {values[0]:g}: they do not belong together"
        )
    return values[1] / (math.sqrt(rank) if configured.rslora else rank)


def _several(word: str, values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    return f"{word} {first:g}" if len(values) == 1 else f"{word}s {first:g} to {last:g}"
