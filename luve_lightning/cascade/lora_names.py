"""The names in LoRA files: which layer, and which part of its update, each tensor is; a summary of a file by them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from luve_lightning.cascade.lora_files import ADAPTER_CONFIG, LoraConfiguration, LoraFile
from luve_lightning.terminal import amount

# Prefixes that wrappers and trainers put before a layer's name, in any nesting; after those that spell the name with
# underscores, more of them with underscores. Not "transformer_", with which other families' blocks begin.
_WRAPPER = re.compile(
    r"^(?:(?:base_model\.model|pipe\.dit|dit|module|model|transformer|diffusion_model)\.+)*"
    r"(?:(?:lora_unet|lora_transformer|lycoris)[._]+"
    r"(?:(?:base_model[._]model|pipe[._]dit|model[._]diffusion_model|diffusion_model)[._]+)*)*"
)
_UNDERSCORED = re.compile(r"(?:^|\.)(?:lora_unet|lora_transformer|lycoris)[._]")
# Wrappers that may stand anywhere in a name: torch.compile's, activation checkpointing's, FSDP's.
_INNER = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)[._]")
PEFT_PREFIX = "base_model.model."
_UNSAID = "nothing in the file: taken as 1"

LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
# PEFT's name of the adapter, which some leave in.
_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
# Ends of names, and the part of an update that they mean.
_PARTS = {
    "A": rf"\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_ADAPTER}\.weight$",
    "B": rf"\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_ADAPTER}\.weight$",
    "bias": rf"\.lora_B{_ADAPTER}\.bias$",
    "mid": rf"\.lora_mid{_ADAPTER}\.weight$",
    "magnitude": r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?$",
    "dora_scale": r"\.dora_scale$",
    "alpha": r"\.alpha$",
    "diff": r"\.(?:diff|w_norm)$",
    "diff_b": r"\.(?:diff_b|b_norm)$",
    "diff_m": r"\.diff_m$",
} | {part: rf"\.{part}{_ADAPTER}$" for part in (*LOKR, *LOHA)}
_ENDS = {part: re.compile(end) for part, end in _PARTS.items()}
# What a layer's update is, by the parts that belong to it.
_KINDS = {
    "LoRA": {"A", "B", "bias", "mid", "magnitude", "dora_scale"},
    "LoKr": set(LOKR),
    "LoHa": set(LOHA),
    "weight difference": {"diff"},
    "bias difference": {"diff_b"},
    "modulation difference": {"diff_m"},
}
# Who writes which prefix, the most telling first.
_WRITERS = (
    (r"^lycoris[._]", "LyCORIS"),
    (r"^lora_unet__", "VideoX-Fun"),
    (r"^lora_unet[._]", "kohya's trainers, musubi-tuner"),
    (r"^lora_transformer[._]", "OneTrainer"),
    (r"^pipe\.dit\.", "DiffSynth-Studio"),
    (r"^base_model\.model\.", "PEFT"),
    (r"^(?:model\.)?diffusion_model\.", "ComfyUI"),
    (r"^transformer\.", "diffusers"),
)


@dataclass(frozen=True)
class LoraName:
    """A tensor's name in a LoRA file, taken apart.

    Attributes:
        part: part of an update, a key of the table above.
        layer: name of the layer without prefixes, as the file spells it.
        raw: the layer's name with its prefixes.
        underscored: whether underscores may stand for the name's dots.
        adapter: PEFT's name of the adapter where it was left in; "" otherwise.
    """

    part: str
    layer: str
    raw: str
    underscored: bool
    adapter: str

    @property
    def place(self) -> str:
        """The layer's name with underscores for dots: equal for both spellings."""
        return self.layer.replace(".", "_")


def parse_name(key: str) -> LoraName | None:
    """A tensor's name taken apart; None where it is no part of an update that is known here."""
    for part, pattern in _ENDS.items():
        if end := pattern.search(key):
            raw = key[: end.start()]
            layer = _WRAPPER.sub("", _INNER.sub("", raw))
            return LoraName(
                part, layer, raw, _UNDERSCORED.search(raw) is not None, end.groupdict().get("adapter") or ""
            )
    return None


@dataclass
class LoraLayer:
    """The parts of one layer's update.

    Attributes:
        parts: tensors by part.
        keys: their names in the file, by part.
        names: names of the layer that a configuration's patterns match.
        scale: factor of the update; differences act at 1.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def kinds(self) -> list[str]:
        """What is there, of LoRA, LoKr, LoHa and differences."""
        return [kind for kind, parts in _KINDS.items() if parts & self.parts.keys()]

    @property
    def low_rank(self) -> bool:
        """Whether its update has a scale: LoRA, LoKr or LoHa."""
        return bool({"LoRA", "LoKr", "LoHa"} & set(self.kinds))

    @property
    def rank(self) -> int | None:
        """Rank of the update; None where none is written in the shapes, as in a LoKr of two full factors."""
        for part, axis in (("A", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0)):
            tensor = self.parts.get(part)
            if tensor is not None and tensor.ndim > axis:
                return int(tensor.shape[axis])
        return None


@dataclass(frozen=True)
class LoraSummary:
    """What part of a LoRA acts, for people and records.

    Attributes:
        name: name of the LoRA.
        layers: number of layers that it changes.
        ranks: all ranks that occur, ascending.
        scales: all values of alpha / rank that occur, ascending; 1 where nothing gives alpha. Differences act at 1 and
            are not among them.
        dora: whether it holds magnitudes.
        biases: number of layers whose biases it changes.
        assumed: PEFT's weights without the file that gives their scale; taken as 1.
        kinds: number of layers of each other kind: LoKr, LoHa, weight difference.
    """

    name: str
    layers: int
    ranks: list[int]
    scales: list[float]
    dora: bool = False
    biases: int = 0
    assumed: bool = False
    kinds: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        more = ", DoRA" if self.dora else ""
        more += f", {self.biases} biases" if self.biases else ""
        more += "".join(f", {number} {kind}{_plural(kind, number)}" for kind, number in self.kinds.items())
        more += f" (assumed: no {ADAPTER_CONFIG} beside it)" if self.assumed else ""
        sizes = [_several(word, values) for word, values in (("rank", self.ranks), ("scale", self.scales)) if values]
        return f"LoRA {self.name}: {', '.join([amount(self.layers, 'layer'), *sizes])}{more}"

    def record(self) -> dict[str, Any]:
        """The summary as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LoraContents:
    """What a LoRA file holds by its names, shapes and configuration, without a transformer; see `describe_lora`.

    Attributes:
        name: name of the file.
        writers: programs that write such names, the most frequent first; "bare names" without a prefix.
        kinds: number of layers by kind of update (LoRA, DoRA, LoKr, LoHa, weight difference, bias difference,
            modulation difference). A layer may have several.
        layers: number of layers that something is for.
        blocks: number of transformer blocks that they reach; 0 where the names have no numbers.
        ranks: all ranks that occur, ascending.
        scales: all factors of updates that occur, ascending; differences, which act at 1, aside.
        scale_from: where the scales come from.
        unknown: names of tensors that are no part of an update known here, in the file's order: with any, the file is
            refused.
        refused: why the file cannot be loaded into any transformer, one line; "" where nothing is known against it.
    """

    name: str
    writers: list[str]
    kinds: dict[str, int]
    layers: int
    blocks: int
    ranks: list[int]
    scales: list[float]
    scale_from: str
    unknown: list[str]
    refused: str

    def record(self) -> dict[str, Any]:
        """The summary as JSON."""
        return asdict(self)


def describe_lora(file: LoraFile) -> LoraContents:
    """Say what a LoRA file holds: `describe_lora(read_lora(path))`.

    Only names, shapes and the configuration are looked at; whether the layers exist in a transformer, and fit, is for
    `fit_lora` to say. A file without a LoRA has 0 layers, and all its tensors are `unknown`.
    """
    parsed = {key: parse_name(key) for key in file.tensors}
    layers: dict[str, LoraLayer] = {}
    for key, name in parsed.items():
        if name is not None:
            names = (name.raw.removeprefix(PEFT_PREFIX), name.layer)
            layer = layers.setdefault(name.place, LoraLayer(names=names))
            layer.parts[name.part], layer.keys[name.part] = file.tensors[key], key
    unknown = [key for key, name in parsed.items() if name is None]
    refused = f"{amount(len(unknown), 'tensor')} not part of a LoRA, for instance {unknown[0]}" if unknown else ""
    scaled = {name: layer for name, layer in layers.items() if layer.low_rank}
    try:
        for place, layer in layers.items():
            check_whole(file.name, place, layer)
        set_scales(scaled, file)
    except ValueError as error:
        refused = refused or str(error)
    kinds = Counter(kind for layer in layers.values() for kind in layer.kinds)
    kinds["DoRA"] = sum(bool({"magnitude", "dora_scale"} & layer.parts.keys()) for layer in layers.values())
    numbers = (re.search(r"blocks[._](\d+)", name.layer) for name in parsed.values() if name is not None)
    return LoraContents(
        file.name,
        _writers(key for key, name in parsed.items() if name is not None),
        {kind: number for kind, number in sorted(kinds.items()) if number},
        len(layers),
        len({int(found[1]) for found in numbers if found}),
        sorted({layer.rank for layer in scaled.values() if layer.rank is not None}),
        sorted({layer.scale for layer in scaled.values()}),
        _scale_from(file, scaled.values()),
        unknown,
        refused,
    )


def check_whole(lora: str, name: str, layer: LoraLayer) -> None:
    """Check that no part of a layer's update lacks the others, and that no two updates are of the same weight.

    Raises:
        ValueError: with the names in the file.
    """
    parts, kinds = layer.parts.keys(), layer.kinds

    def lacks(*needed: str) -> bool:
        return not parts >= set(needed)

    if "LoRA" in kinds and lacks("A", "B"):
        there = layer.keys.get("A") or layer.keys.get("B") or next(iter(layer.keys.values()))
        raise ValueError(f"LoRA {lora}: {name} has {there} without its other half: the LoRA is incomplete")
    whole = {
        "LoKr": all(
            (factor in parts) != ({f"{factor}_a", f"{factor}_b"} <= parts)
            and (f"{factor}_a" in parts) == (f"{factor}_b" in parts)
            for factor in ("lokr_w1", "lokr_w2")
        )
        and not ("lokr_t2" in parts and lacks("lokr_w2_a")),
        "LoHa": not lacks("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        and ("hada_t1" in parts) == ("hada_t2" in parts),
    }
    for kind, complete in whole.items():
        if kind in kinds and not complete:
            there = ", ".join(sorted(key for part, key in layer.keys.items() if part in _KINDS[kind]))
            raise ValueError(f"LoRA {lora}: {name} is an incomplete {kind}: it has only {there}")
    inner = [f"{factor}_b" for factor in ("lokr_w1", "lokr_w2", "hada_w1", "hada_w2") if f"{factor}_b" in parts]
    if len({layer.parts[part].shape[:1] for part in inner}) > 1:
        raise ValueError(
            f"LoRA {lora}: the factors of {name} have different ranks: {', '.join(layer.keys[part] for part in inner)}"
        )
    if "alpha" in parts and not layer.low_rank:
        raise ValueError(f"LoRA {lora}: {layer.keys['alpha']} scales nothing: {name} has no low-rank update")
    of_weight = [kind for kind in kinds if kind not in ("bias difference", "modulation difference")]
    if len(of_weight) > 1:
        raise ValueError(
            f"LoRA {lora}: {name} has both a {' and a '.join(of_weight)} of the same weight, for instance "
            f"{next(iter(layer.keys.values()))}: expected one"
        )
    if "dora_scale" in parts and of_weight != ["LoRA"]:
        raise ValueError(f"LoRA {lora}: {layer.keys['dora_scale']}: DoRA is honoured on LoRA alone")


def set_scales(layers: Mapping[str, LoraLayer], file: LoraFile) -> None:
    """Set the scale of layers of low-rank updates: alpha / rank, from tensors or the configuration; 1 without either.

    Raises:
        ValueError: where these contradict each other or do not fit the weights, the file's header says that tensors
            of alpha are missing, or a scale is given for a file that says its own, or has nothing to scale.
    """
    if file.given_scale is not None:
        _give_scale(layers, file, file.given_scale)
        return
    configured = file.configuration
    used: set[str] = set()
    for name, layer in layers.items():
        alpha, rank = layer.parts.get("alpha"), layer.rank
        if alpha is not None:
            if alpha.numel() != 1 or not alpha.item():
                raise ValueError(f"LoRA {file.name}: {layer.keys['alpha']}: expected one number other than 0")
            # As LyCORIS: a LoKr of two full factors has no scale, whatever alpha it was saved with.
            layer.scale = 1.0 if rank is None else alpha.item() / rank
        if configured is not None:
            scale = _configured_scale(configured, layer, name, file.name, used)
            if alpha is not None and not math.isclose(scale, layer.scale, rel_tol=1e-6):
                raise ValueError(
                    f"LoRA {file.name}: {layer.keys['alpha']} scales {name} by {layer.scale:g}, "
                    f"{configured.where} by {scale:g}"
                )
            layer.scale = scale
    for pattern in () if configured is None else (*configured.ranks, *configured.alphas):
        if configured is not None and pattern not in used:
            raise ValueError(f"LoRA {file.name}: {configured.where}: the pattern {pattern!r} fits none of its layers")
    _check_kohya(layers, file)


def _give_scale(layers: Mapping[str, LoraLayer], file: LoraFile, scale: float) -> None:
    """Set a scale that no file says, where none does."""
    own = "its header" if file.trained_scale is not None else _scale_from(file, layers.values())
    if own != _UNSAID:
        raise ValueError(f"LoRA {file.name}: lora_scale {scale:g} is for a file that says no scale; here it is {own}")
    if not scale or not math.isfinite(scale):
        raise ValueError(f"LoRA {file.name}: lora_scale: expected a number other than 0, got {scale}")
    for layer in layers.values():
        layer.scale = scale


def _check_kohya(layers: Mapping[str, LoraLayer], file: LoraFile) -> None:
    """Refuse a kohya file whose alphas were taken out.

    Its trainers save an alpha with every layer, and their loaders take a missing one as the rank. Names with dots come
    from converters, which put alpha into the weights and keep the header.
    """
    trained = file.trained_scale
    if file.configuration is not None or trained is None or math.isclose(trained, 1.0):
        return
    for name, layer in layers.items():
        key = next(iter(layer.keys.values()))
        parsed = parse_name(key)
        if "alpha" not in layer.parts and layer.rank is not None and parsed is not None and parsed.underscored:
            raise ValueError(
                f"LoRA {file.name}: its header says that it was trained at scale {trained:g} (ss_network_alpha / "
                f"ss_network_dim), but {name} has no tensor {parsed.raw}.alpha: its scale is not known"
            )


def _configured_scale(configured: LoraConfiguration, layer: LoraLayer, name: str, lora: str, used: set[str]) -> float:
    """A layer's scale by PEFT's configuration, whose rank must be that of the weights."""
    values: list[float] = []
    for patterns, other in ((configured.ranks, configured.rank), (configured.alphas, configured.alpha)):
        # Like peft.utils.other.get_pattern_key: the first pattern that matches the name's end counts.
        hits = [p for p in patterns if any(re.match(rf"(.*\.)?({p})$", own) for own in layer.names)]
        used.update(hits)
        values.append(patterns[hits[0]] if hits else other)
    rank = values[0] if layer.rank is None else layer.rank
    if values[0] != rank:
        raise ValueError(
            f"LoRA {lora}: {name} has rank {rank}, {configured.where} says {values[0]:g}: they do not belong together"
        )
    return values[1] / (math.sqrt(rank) if configured.rslora else rank)


def _writers(keys: Iterable[str]) -> list[str]:
    found = Counter(next((who for start, who in _WRITERS if re.search(start, key)), "bare names") for key in keys)
    return [who for who, _ in found.most_common()]


def _scale_from(file: LoraFile, layers: Iterable[LoraLayer]) -> str:
    given: Sequence[bool] = ["alpha" in layer.parts for layer in layers]
    if file.configuration is not None:
        return file.configuration.where
    if not given:
        return "no scale: differences act at 1"
    if all(given):
        return "its alpha tensors"
    return "its alpha tensors, 1 without one" if any(given) else _UNSAID


def _several(word: str, values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    return f"{word} {first:g}" if len(values) == 1 else f"{word}s {first:g} to {last:g}"


def _plural(kind: str, number: int) -> str:
    return "s" if kind.endswith("difference") and number > 1 else ""
