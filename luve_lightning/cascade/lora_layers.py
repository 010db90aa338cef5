"""A LoRA's tensors fitted to a transformer: each gets its layer and scale, or the whole LoRA is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luve_lightning.cascade.lora_files import LoraFile
from luve_lightning.cascade.lora_names import (
    LOHA,
    LOKR,
    PEFT_PREFIX,
    LoraLayer,
    LoraSummary,
    check_whole,
    parse_name,
    set_scales,
)
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.terminal import amount


@dataclass(frozen=True)
class WeightDifference:
    """What an update adds to one parameter at strength 1, made anew each time from the tensors of its file.

    Attributes:
        parts: tensors by part: `diff`, or those of a LoKr, a LoHa, or a LoRA of convolutions with a middle (Tucker).
        scale: factor.
        shape: the parameter's shape.
    """

    parts: Mapping[str, Tensor]
    scale: float
    shape: torch.Size

    def tensor(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The difference, of the parameter's shape.

        Raises:
            ValueError: where the tensors do not give that shape; on the device "meta" nothing is computed.
        """
        try:
            found = self._update({part: tensor.to(device, dtype) for part, tensor in self.parts.items()})
        except (RuntimeError, IndexError) as error:  # shapes that cannot be multiplied
            raise ValueError("shapes do not fit each other") from error
        if found.shape != self.shape:
            raise ValueError(f"gives shape {tuple(found.shape)}")
        return found if self.scale == 1 else self.scale * found

    def _update(self, t: Mapping[str, Tensor]) -> Tensor:
        if "diff" in t:
            return t["diff"]
        if "mid" in t:
            return torch.einsum("oa,ab...,bi->oi...", t["B"].flatten(1), t["mid"], t["A"].flatten(1))
        if "hada_w1_a" in t:
            first, second = (_factor(t, f"hada_w{n}", t.get(f"hada_t{n}")) for n in (1, 2))
            return self._unflattened(first * second)
        first, second = _factor(t, "lokr_w1", None), _factor(t, "lokr_w2", t.get("lokr_t2"))
        kernel = self.shape[2:]
        second = second if second.ndim == len(self.shape) else second.reshape(len(second), -1, *kernel)
        return torch.kron(first.reshape(*first.shape, *(1 for _ in kernel)), second)

    def _unflattened(self, update: Tensor) -> Tensor:
        """An update of a convolution, whose kernel may be flattened into the columns."""
        return update.unflatten(1, (-1, *self.shape[2:])) if update.ndim < len(self.shape) else update


def _factor(t: Mapping[str, Tensor], name: str, core: Tensor | None) -> Tensor:
    """A factor of a LoKr or LoHa: whole, a product of two, or of two and a core."""
    if name in t:
        return t[name]
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return a @ b if core is None else torch.einsum("ij...,ip,jr->pr...", core, a, b)


@dataclass(frozen=True)
class FittedLora:
    """A LoRA for one transformer.

    Attributes:
        state_dict: halves of LoRA layers: PEFT's names with diffusers' prefix "transformer.".
        metadata: the arguments of PEFT's LoraConfig with the same prefix.
        scales: of the LoRA layers, by module.
        differences: everything else, by the parameter that it is added to.
        summary: for people.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, Any]
    scales: dict[str, float]
    differences: dict[str, WeightDifference]
    summary: LoraSummary


def fit_lora(transformer: Any, file: LoraFile) -> FittedLora:
    """Give every tensor of a LoRA its place in the transformer.

    The names of diffusers, the family's own code (ComfyUI, DiffSynth-Studio) and kohya's trainers are known, for
    all layers or some. `W + scale * B A` with scale alpha / rank, from tensors `alpha` or the configuration; 1
    without either. LoKr and LoHa likewise; full-rank differences of weights, biases and tables as they are. The
    transformer has no experts' layers, but may have other LoRAs.

    Raises:
        ValueError: when a tensor has no place, does not fit, or lacks its counterpart; nothing is ever left out.
    """
    layers = _layers(denoiser_of(transformer), file)
    set_scales({name: layer for name, layer in layers.items() if layer.low_rank}, file)
    loras = {name: layer for name, layer in layers.items() if "A" in layer.parts and "mid" not in layer.parts}
    _check_configuration(file, layers, loras)
    differences: dict[str, WeightDifference] = {}
    for name, layer in layers.items():
        differences |= _differences(transformer, file.name, name, layer)
    dora = any("magnitude" in layer.parts for layer in loras.values())
    biases = [name for name, layer in loras.items() if "bias" in layer.parts]
    found: dict[str, Tensor] = {}
    for name, layer in loras.items():
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = layer.parts["A"], layer.parts["B"]
        if dora:
            found[f"{name}.lora_magnitude_vector"] = layer.parts["magnitude"].flatten()
        if biases:  # PEFT has them in all layers or in none, and scales them
            found[f"{name}.lora_B.bias"] = layer.parts.get("bias", torch.zeros(len(layer.parts["B"])))
    return FittedLora(
        {f"transformer.{key}": tensor for key, tensor in found.items()},
        {f"transformer.{key}": value for key, value in _settings(loras, dora, bool(biases)).items()},
        {name: layer.scale for name, layer in loras.items()},
        differences,
        _summary(file, layers, dora),
    )


def _check_configuration(file: LoraFile, layers: Mapping[str, LoraLayer], loras: Mapping[str, LoraLayer]) -> None:
    """Check that the configuration is for weights of this kind, and that DoRA's magnitudes and biases are whole."""
    dora = [name for name, layer in loras.items() if "magnitude" in layer.parts]
    if dora and len(dora) < len(loras):
        lacks = next(name for name in loras if name not in dora)
        raise ValueError(
            f"LoRA {file.name}: {len(dora)} of its {amount(len(loras), 'layer')} with DoRA's magnitude, {lacks} without"
        )
    configured = file.configuration
    if configured is None:
        return
    others = {kind for layer in layers.values() for kind in layer.kinds if layer.low_rank} - {configured.kind}
    if strange := sorted(others & {"LoRA", "LoKr", "LoHa"}):
        raise ValueError(
            f"LoRA {file.name}: {configured.where} is of a {configured.kind}, the weights are a {strange[0]}'s"
        )
    if configured.dora != bool(dora):
        raise ValueError(f"LoRA {file.name}: {configured.where} and the weights disagree on DoRA's magnitudes")
    if configured.biases and not all({"bias", "diff_b"} & layer.parts.keys() for layer in loras.values()):
        raise ValueError(f"LoRA {file.name}: {configured.where} has lora_bias, and biases are missing in the weights")


def _differences(transformer: Any, lora: str, name: str, layer: LoraLayer) -> dict[str, WeightDifference]:
    """What a layer adds to parameters, by their names; shapes are checked."""
    parts = layer.parts
    factors = [part for part in (*LOKR, *LOHA, *(("A", "B", "mid") if "mid" in parts else ())) if part in parts]
    found: dict[str, WeightDifference] = {}
    for end, wanted, scale in (("weight", factors, layer.scale), ("weight", ["diff"], 1.0), ("bias", ["diff_b"], 1.0)):
        if not wanted or not set(wanted) <= parts.keys():
            continue
        keys = ", ".join(layer.keys[part] for part in wanted)
        target = name if _is_parameter(transformer, name) else f"{name}.{end}"
        try:
            shape = parameter_of(transformer, target).shape
        except AttributeError:
            raise ValueError(f"LoRA {lora}: {keys}: {name} of this transformer has no {end}") from None
        tensors = {"diff": parts["diff_b"]} if wanted == ["diff_b"] else {part: parts[part] for part in wanted}
        found[target] = WeightDifference(tensors, scale, shape)
        try:
            found[target].tensor("meta", torch.float32)
        except ValueError as error:
            raise ValueError(
                f"LoRA {lora}: {keys}: {error}, {target} of this transformer takes {tuple(shape)}"
            ) from None
    return found


def _settings(loras: Mapping[str, LoraLayer], dora: bool, biases: bool) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig."""
    if not loras:
        return {}
    ranks = {name: len(layer.parts["A"]) for name, layer in loras.items()}
    exact = {f"^{re.escape(name)}": name for name in loras}
    return {
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(ranks.values())),
        "rank_pattern": {pattern: ranks[name] for pattern, name in exact.items()},
        "alpha_pattern": {pattern: loras[name].scale * ranks[name] for pattern, name in exact.items()},
        "target_modules": list(loras),
        "use_dora": dora,
        "lora_bias": biases,
    }


def _summary(file: LoraFile, layers: Mapping[str, LoraLayer], dora: bool) -> LoraSummary:
    low_rank = [layer for layer in layers.values() if layer.low_rank]
    kinds = Counter(kind for layer in layers.values() for kind in layer.kinds)
    given = file.given_scale is not None or any("alpha" in layer.parts for layer in low_rank)
    unscaled = file.configuration is None and not given
    return LoraSummary(
        file.name,
        len(layers),
        sorted({layer.rank for layer in low_rank if layer.rank is not None}),
        sorted({layer.scale for layer in low_rank}),
        dora=dora,
        biases=sum(bool({"bias", "diff_b"} & layer.parts.keys()) for layer in layers.values()),
        assumed=bool(low_rank) and unscaled and any(key.startswith(PEFT_PREFIX) for key in file.tensors),
        kinds={kind: kinds[kind] for kind in ("LoKr", "LoHa", "weight difference") if kinds[kind]},
    )


def _layers(denoiser: Denoiser, file: LoraFile) -> dict[str, LoraLayer]:
    """Every tensor under its module, or parameter that is in none of torch's own, and part; all shapes checked."""
    places = _places(denoiser)
    layers: dict[str, LoraLayer] = {}
    strange: list[str] = []
    elsewhere: list[str] = []
    adapters: set[str] = set()
    for key, tensor in file.tensors.items():
        parsed = parse_name(key)
        if parsed is None:
            strange.append(key)
            continue
        adapters |= {parsed.adapter} - {""}
        part = "diff" if parsed.part == "diff_m" else parsed.part
        name = places.get(f"{parsed.place}_{denoiser.modulation}" if parsed.part == "diff_m" else parsed.place)
        if name is None:
            elsewhere.append(parsed.layer)
            continue
        own = (
            (name, denoiser.original_name(name))
            if parsed.underscored
            else (parsed.raw.removeprefix(PEFT_PREFIX), parsed.layer)
        )
        layer = layers.setdefault(name, LoraLayer(names=own))
        if part in layer.keys:
            raise ValueError(f"LoRA {file.name}: {layer.keys[part]} and {key} are the same part of {name}")
        layer.parts[part], layer.keys[part] = _checked(tensor, key, file.name), key
    _refuse_strangers(file, strange, elsewhere, len(layers), denoiser)
    if len(adapters) > 1:
        raise ValueError(f"LoRA {file.name}: holds several adapters: {', '.join(sorted(adapters))}")
    for name, layer in layers.items():
        _check_layer(file.name, name, layer, denoiser.module)
    # In the transformer's order: the same LoRA gives the same summary whatever the file's order.
    return {name: layers[name] for name in dict.fromkeys(places.values()) if name in layers}


def _places(denoiser: Denoiser) -> dict[str, str]:
    """Modules and parameters by every name that a LoRA may use for them, with underscores for dots.

    Where two share a name, the one with parameters counts: diffusers' norm3 of a Wan block has none, Wan's own norm3
    is diffusers' norm2.
    """
    modules = {
        name: module
        for name, module in denoiser.module.named_modules()
        if name and not re.search(r"(^|\.)(base_layer|lora_\w+)(\.|$)", name)
    }
    names: dict[str, bool] = {}  # in the transformer's order, with whether there is something to change
    for prefix, module in {"": denoiser.module, **modules}.items():
        own = [name for name, _ in below(module).named_parameters(recurse=False)]
        if prefix:
            names[prefix] = bool(own)
        names |= {f"{prefix}.{name}".removeprefix("."): True for name in own if name not in ("weight", "bias")}
    places: dict[str, str] = {}
    for has_parameters in (False, True):
        chosen = [name for name, has in names.items() if has == has_parameters]
        places |= {denoiser.original_name(name).replace(".", "_"): name for name in chosen}
        places |= {name.replace(".", "_"): name for name in chosen}
    order = {name: index for index, name in enumerate(names)}
    return dict(sorted(places.items(), key=lambda item: order[item[1]]))


def _is_parameter(transformer: Any, name: str) -> bool:
    try:
        return isinstance(parameter_of(transformer, name), nn.Parameter)
    except AttributeError:
        return False


def _refuse_strangers(
    file: LoraFile, strange: Sequence[str], elsewhere: Sequence[str], known: int, denoiser: Denoiser
) -> None:
    if not file.tensors or len(strange) == len(file.tensors):
        example = f", for instance {strange[0]}" if strange else ""
        kind = type(denoiser.module).__name__
        raise ValueError(f"LoRA {file.name}: holds no weights of a LoRA for a {kind}{example}")
    if strange:
        raise ValueError(
            f"LoRA {file.name}: {len(strange)} of its {amount(len(file.tensors), 'tensor')}: no parts of a LoRA, "
            f"cannot be honoured, for instance {', '.join(sorted(strange)[:3])}"
        )
    if elsewhere:
        unknown = sorted(set(elsewhere))
        raise ValueError(
            f"LoRA {file.name}: {len(unknown)} of its {amount(known + len(unknown), 'layer')}: not in this transformer "
            f"of {amount(len(denoiser.blocks), 'block')}, for instance {unknown[0]}"
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


def _check_layer(lora: str, name: str, layer: LoraLayer, transformer: nn.Module) -> None:
    """Check that the update is whole, and its halves each of the shape that the module needs."""
    check_whole(lora, name, layer)
    if not layer.low_rank:
        return
    if _is_parameter(transformer, name):
        base: Any = parameter_of(transformer, name)
    else:
        base = below(transformer)
        for part in name.split("."):
            base = below(getattr(base, part))
    if not isinstance(base, nn.Linear | nn.Conv3d):
        raise ValueError(
            f"LoRA {lora}: {name} is not a linear layer but a {type(base).__name__}: {layer.keys.popitem()[1]}"
        )
    if "A" not in layer.parts or "mid" in layer.parts:
        return  # see _differences
    a, b, width = layer.parts["A"], layer.parts["B"], base.weight.shape
    rank, rank_b = len(a) if a.ndim else 0, b.shape[1] if b.ndim > 1 else 0
    if rank != rank_b or rank < 1:
        raise ValueError(
            f"LoRA {lora}: the halves of {name} have ranks {rank} and {rank_b}: {layer.keys['A']}, {layer.keys['B']}"
        )
    linear = isinstance(base, nn.Linear)
    wanted = {
        "A": (rank, *width[1:]),
        "B": (width[0], rank) if linear else (width[0], rank, 1, 1, 1),
        "bias": (width[0],),
    }
    for part, shape in wanted.items():
        if part in layer.parts and tuple(layer.parts[part].shape) != shape:
            raise ValueError(
                f"LoRA {lora}: {layer.keys[part]} has shape {tuple(layer.parts[part].shape)}, "
                f"{name} of this transformer takes {shape}"
            )
    _check_dora(lora, name, layer, width[0], linear)


def _check_dora(lora: str, name: str, layer: LoraLayer, rows: int, linear: bool) -> None:
    """Check DoRA's magnitude, and bring LyCORIS' to PEFT's form, one value for each output."""
    if "dora_scale" in layer.parts:
        if "magnitude" in layer.parts:
            raise ValueError(f"LoRA {lora}: {name} has both {layer.keys['magnitude']} and {layer.keys['dora_scale']}")
        given = layer.parts["dora_scale"]
        if given.shape[1:].numel() != 1 or given.ndim < 2:
            raise ValueError(
                f"LoRA {lora}: {layer.keys['dora_scale']} has shape {tuple(given.shape)}: magnitudes of inputs are not "
                f"honoured, expected ({rows}, 1), one for each output (LyCORIS' wd_on_output)"
            )
        layer.parts["magnitude"], layer.keys["magnitude"] = given, layer.keys["dora_scale"]
    if "magnitude" in layer.parts and layer.parts["magnitude"].numel() != rows:
        raise ValueError(
            f"LoRA {lora}: {layer.keys['magnitude']} has {layer.parts['magnitude'].numel()} values, expected {rows}"
        )
    if "magnitude" in layer.parts and not linear:
        raise ValueError(f"LoRA {lora}: {name}: DoRA is honoured for linear layers only")


def parameter_of(transformer: Any, name: str) -> nn.Parameter:
    """A parameter by the name that it has in the transformer without experts and other adapters.

    Raises:
        AttributeError: where there is none.
    """
    module = transformer
    *path, last = name.split(".")
    for part in path:
        module = below(getattr(module, part))
    found = getattr(module, last)
    if not isinstance(found, nn.Parameter):
        raise AttributeError(f"{name} is no parameter")
    return found


def below(module: Any) -> Any:
    """The transformer's own module, below any adapters."""
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    return module
