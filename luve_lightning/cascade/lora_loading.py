"""LoRAs in a pipeline's transformers: LoRA layers by PEFT, and everything else added to the weights themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luve_lightning.cascade.expert_choice import switch_expert
from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_layers import FittedLora, WeightDifference, fit_lora, parameter_of
from luve_lightning.cascade.lora_names import LoraSummary
from luve_lightning.models.experts import expert_names, experts_set_aside

_NAME = "lora_additions"  # in the transformer; diffusers and PEFT skip what has "lora" in its name
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LoraAdditions(nn.Module, BaseTunerLayer):
    """The differences that are added to a transformer's weights, each at the strength of its adapter.

    PEFT and diffusers take it for one more layer of the adapters and tell it which are active and how strong, as
    `set_adapters`, `disable_lora`, `delete_adapters` and `attention_kwargs={"scale": ...}` ask. Weights are written
    when that changes: W + the sum of strength times difference, computed in float32 and rounded once. The weights from
    before are kept on the CPU, restored bit for bit, and what the transformer's state dict holds.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self._transformer = (transformer,)  # in a tuple: not a submodule of its own submodule
        self._differences: dict[str, dict[str, WeightDifference]] = {}  # by adapter and parameter
        self._strengths: dict[str, float] = {}
        self._in_force: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._active_adapter: str | list[str] = []
        self.lora_A: dict[str, Any] = {}  # none, for those who move adapters
        self.lora_B: dict[str, Any] = {}

    @property
    def r(self) -> Mapping[str, Any]:
        """Adapters by name, as diffusers counts them."""
        return self._differences

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights from before, by the parameter's name without adapters, of all that are changed now."""
        return dict(self._before)

    @property
    def _active(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def add(self, adapter: str, differences: Mapping[str, WeightDifference]) -> None:
        """Add an adapter's differences, by the names of parameters, at strength 1; it alone is active then.

        So does PEFT with the layers of an adapter that it loads.
        """
        self._differences[adapter], self._strengths[adapter] = dict(differences), 1.0
        self.set_adapter(adapter)

    def sync(self) -> None:
        """Bring the weights to the strengths that are asked for now; adapters that were unloaded are dropped."""
        there = getattr(self._transformer[0], "peft_config", {})
        asked = [] if self.disable_adapters else [name for name in self._active if name in there]
        wanted = {
            name: strength for name, strength in self._strengths.items() if name in asked and strength != 0
        }  # in the order of loading, whatever that of activation
        changed = {name for name in wanted | self._in_force if wanted.get(name) != self._in_force.get(name)}
        for parameter in sorted({parameter for name in changed for parameter in self._differences[name]}):
            self._write(parameter, wanted)
        self._in_force = wanted
        for name in [name for name in self._differences if name not in there]:
            del self._differences[name], self._strengths[name]

    @torch.no_grad()
    def _write(self, name: str, strengths: Mapping[str, float]) -> None:
        parameter = parameter_of(self._transformer[0], name)
        terms = [
            (strength, self._differences[adapter][name])
            for adapter, strength in strengths.items()
            if name in self._differences[adapter]
        ]
        if name not in self._before:
            self._before[name] = parameter.detach().to("cpu", copy=True)
        if not terms:
            parameter.copy_(self._before.pop(name))
            return
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        total = self._before[name].to(parameter.device, dtype)
        for strength, difference in terms:
            total = total + strength * difference.tensor(parameter.device, dtype)
        parameter.copy_(total)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's choice of adapters."""
        del inference_mode
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's switch for all adapters."""
        self._disable_adapters = not enabled
        self.sync()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter (PEFT calls it for every layer)."""
        self._active_adapter = [name for name in self._active if name != adapter_name]
        self.sync()
        self._differences.pop(adapter_name, None)
        self._strengths.pop(adapter_name, None)

    def set_scale(self, adapter: str, scale: float) -> None:
        """The strength of an adapter."""
        if adapter in self._strengths:
            self._strengths[adapter] = float(scale)
            self.sync()

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self._strengths.keys() & set(self._active):
            self._strengths[name] *= scale
        self.sync()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets the strength to 1."""
        for name in self._strengths.keys() & set(self._active):
            self._strengths[name] = 1.0 if scale is None else self._strengths[name] / scale
        self.sync()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: unloading the LoRA would leave its LoRA layers in the weights, but not its differences."""
        del safe_merge, adapter_names
        raise ValueError("a LoRA with full-rank differences cannot be fused into the weights")

    def unmerge(self) -> None:
        """Nothing: it is never merged."""


def additions_of(transformer: Any) -> LoraAdditions | None:
    """The transformer's additions; None where it never had any."""
    found: LoraAdditions | None = getattr(transformer, _NAME, None)
    return found


def add_differences(transformer: Any, adapter: str, differences: Mapping[str, WeightDifference]) -> None:
    """Add an adapter's differences to a transformer's weights, at strength 1; it alone is active then.

    Args:
        transformer: see `check_writable`.
        adapter: a name in its `peft_config`.
        differences: by the names of parameters, as `parameter_of` takes them.
    """
    additions = additions_of(transformer)
    if additions is None:
        additions = LoraAdditions(transformer)
        transformer.add_module(_NAME, additions)
        # Module-level functions: a deep copy of the transformer has its own additions.
        transformer.register_forward_pre_hook(_sync)
        transformer.register_state_dict_post_hook(_put_back)
    additions.add(adapter, differences)


def check_writable(transformer: Any, lora: str, names: Iterable[str]) -> None:
    """Check that these parameters can be written in place.

    Raises:
        ValueError: where they are quantised, or kept elsewhere than in the transformer.
    """
    if _is_group_offload_enabled(transformer):
        raise ValueError(f"LoRA {lora}: its full-rank differences cannot be added under diffusers' group offloading")
    for name in names:
        parameter = parameter_of(transformer, name)
        if parameter.is_meta or parameter.dtype not in _FLOATS:
            kept = "kept elsewhere (sequential offloading)" if parameter.is_meta else f"of {parameter.dtype}"
            raise ValueError(f"LoRA {lora}: its full-rank differences cannot be added: {name} is {kept}")


def _sync(transformer: Any, args: tuple[Any, ...]) -> None:
    """Before a forward pass: `unload_lora` of diffusers tells the layers nothing."""
    del args
    transformer.get_submodule(_NAME).sync()


def _put_back(transformer: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Give the state dict the weights from before, so that no LoRA is saved with the transformer."""
    del metadata
    before = {id(parameter_of(transformer, name)): w for name, w in transformer.get_submodule(_NAME).weights.items()}
    for name, parameter in transformer.named_parameters(remove_duplicate=False):
        if id(parameter) in before:
            state[prefix + name] = before[id(parameter)]


def load_lora(transformers: Sequence[Any], file: LoraFile, adapter_name: str | None, pipeline: Any) -> LoraSummary:
    """Load a LoRA whole into every transformer, or into none; returns what was loaded, at which scale.

    Without `adapter_name` it is the first free one of default_0, default_1 ...; diffusers handles the offloading of
    `pipeline`.

    Raises:
        ValueError: for a LoRA that cannot be loaded whole, and a name that is taken.
    """
    taken = {name for transformer in transformers for name in getattr(transformer, "peft_config", {})}
    if adapter_name is None:
        adapter_name = next(name for n in range(len(taken) + 1) if (name := f"default_{n}") not in taken)
    elif adapter_name in taken:
        raise ValueError(f"LoRA {file.name}: the name {adapter_name!r} is taken by another adapter: choose a new one")
    fitted = []
    for transformer in transformers:  # all of them before the first is touched
        with experts_set_aside(transformer):
            fitted.append(fit_lora(transformer, file))
            check_writable(transformer, file.name, fitted[-1].differences)
    for transformer, lora in zip(transformers, fitted, strict=True):
        with experts_set_aside(transformer), warnings.catch_warnings():
            # Several adapters are intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            if lora.state_dict:
                transformer.load_lora_adapter(
                    dict(lora.state_dict),
                    network_alphas=None,
                    adapter_name=adapter_name,
                    metadata=lora.metadata,
                    _pipeline=pipeline,
                )
            else:
                _register(transformer, adapter_name)
            if lora.differences:
                add_differences(transformer, adapter_name, lora.differences)
            _check_loaded(transformer, adapter_name, lora)
    return fitted[0].summary


def _register(transformer: Any, adapter: str) -> None:
    """Make an adapter without LoRA layers known to PEFT and diffusers, and the only active one, as a loaded one is."""
    transformer.peft_config = {**getattr(transformer, "peft_config", {}), adapter: LoraConfig(r=1)}
    transformer._hf_peft_config_loaded = True
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([adapter])


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


class LoraLoading(LoraBaseMixin):
    """Loading other people's LoRAs; the mixin of LuVePipeline for that. The rest is diffusers'."""

    transformer: Any

    @property
    def transformers(self) -> list[Any]:
        """Every transformer once."""
        raise NotImplementedError

    @property
    def refinement_transformer(self) -> Any:
        """The transformer of the third stage."""
        raise NotImplementedError

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor] | LoraFile,
        adapter_name: str | None = None,
        into: str = "both",
        **kwargs: Any,
    ) -> LoraSummary:
        """Load a LoRA for the backbone beside the experts, for instance UltraWan's, and activate it.

        Layers may have diffusers' names, or the original model's as written by ComfyUI, kohya's trainers and
        DiffSynth-Studio. A LoRA is loaded whole, at the scale given by its tensors, its file's header or PEFT's
        `adapter_config.json` beside it, or not at all. `set_adapters`, `delete_adapters` and the like are
        diffusers'; the stages choose experts independently of them.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, hub id, the weights or what `read_lora` read.
            adapter_name: default the first free one of default_0, default_1 ...
            into: "transformer" (first stage, direct generation), "refiner" (third stage), or "both".
            kwargs: options of `read_lora`, such as `weight_name`.

        Returns:
            What was loaded, and at which scale.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: for a LoRA that cannot be loaded whole, and an unknown `into`.
        """
        chosen = {
            "both": self.transformers,
            "transformer": [self.transformer],
            "refiner": [self.refinement_transformer],
        }
        if into not in chosen:
            raise ValueError(f"into: expected both, transformer or refiner, got {into!r}")
        file = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        summary = load_lora(chosen[into], file, adapter_name, self)
        for transformer in chosen[into]:
            switch_expert(transformer, None)
        return summary

    def unload_lora_weights(self) -> None:
        """Remove every LoRA; the experts stay, and the weights are bit for bit those from before."""
        for transformer in self.transformers:
            with experts_set_aside(transformer):
                transformer.unload_lora()
                if (additions := additions_of(transformer)) is not None:
                    additions.sync()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Choose LoRAs and their strengths; see diffusers.

        Raises:
            ValueError: for strengths by layer where a LoRA has full-rank differences.
        """
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]
        by_layer = any(isinstance(weight, dict) for weight in weights)
        if by_layer and (adapter := self._added([adapter_names] if isinstance(adapter_names, str) else adapter_names)):
            raise ValueError(f"the LoRA {adapter!r} has full-rank differences, which take one strength for all layers")
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Put the LoRA layers into the weights; see diffusers.

        Raises:
            ValueError: where a LoRA has full-rank differences, which unloading it would take out again.
        """
        if adapter := self._added(None):
            raise ValueError(f"the LoRA {adapter!r} has full-rank differences and cannot be fused: keep it loaded")
        super().fuse_lora(*args, **kwargs)

    def _added(self, names: Sequence[str] | None) -> str | None:
        """The first of these LoRAs, or of all, that has full-rank differences."""
        found = (additions_of(transformer) for transformer in self.transformers)
        added = [name for additions in found if additions is not None for name in additions.r]
        return next((name for name in added if names is None or name in names), None)
