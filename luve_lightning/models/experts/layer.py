"""An expert's PEFT layer, a filtered LoRA around a whole module; adding experts, and choosing what is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luve_lightning.functional.frequency import filter_tokens
from luve_lightning.models.backbones import Denoiser, denoiser_of
from luve_lightning.models.experts.routing import (
    ActiveExpert,
    Call,
    ExpertConfig,
    ExpertState,
    activate,
    expert_names,
    install,
    state_of,
)


class ExpertLayer(nn.Module, LoraLayer):
    """y = module(x) + alpha / rank * B(filter(A(x))), for each active expert.

    The filter acts on token positions and A on channels, so filtering after A gives the same as before it, on
    `rank` channels instead of the model's width. B starts at zero. Weights in another dtype than the tokens
    (float32 beside a bfloat16 base) are cast for the product; the tokens are not.

    `LoraConfig._register_custom_module` makes PEFT wrap with it; `add_expert` does so.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # made like LoraLayer's
    lora_B: nn.ModuleDict
    scaling: dict[str, float]
    in_features: int
    out_features: int
    expert_state: ExpertState | None = None  # shared with the transformer; see routing.py
    expert_call: Call | None = None  # for the running forward pass; set by a hook on the block

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        widths: Callable[[nn.Module], tuple[int, int]],
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._widths = widths
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output for tokens B x N x C plus the corrections of the active experts."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.expert_call is None:
            raise ValueError(
                "an expert layer ran outside its transformer's forward pass, or was not made by add_expert "
                "or load_expert: it does not know the token grid"
            )
        for name, expert in self.expert_call.experts.items():
            if name in self.lora_A:
                hidden = self.hidden(x, name, expert, self.expert_call)
                output = self._corrected(output, hidden, name)
        return output

    def hidden(self, x: Tensor, name: str, expert: ActiveExpert, call: Call) -> Tensor:
        """The input of B: filter(A(x)), B x N x rank, weighted per sample."""
        hidden = nn.functional.linear(x, _weight(self.lora_A, name).to(x.dtype))
        if expert.filter is not None:
            # Only these `rank` channels of a split clip travel.
            whole = hidden if call.split is None else call.split.gather(hidden)
            whole = filter_tokens(whole, call.grid, expert.filter, expert.matrices)
            hidden = whole if call.split is None else call.split.own(whole)
        if expert.weights is not None:
            hidden = hidden * expert.weights.to(hidden.dtype)[:, None, None]
        return hidden

    def _corrected(self, output: Tensor, hidden: Tensor, name: str) -> Tensor:
        """Product and sum in one kernel; the correction itself is never stored."""
        weight = _weight(self.lora_B, name).to(output.dtype)
        flat = torch.addmm(
            output.flatten(0, 1), hidden.flatten(0, 1).to(output.dtype), weight.t(), alpha=self.scaling[name]
        )
        return flat.view_as(output)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add one adapter to this layer (PEFT calls it)."""
        if config.use_dora or config.lora_bias or config.lora_dropout:
            raise ValueError(f"expert {adapter_name}: DoRA, bias and dropout do not go with a filter around a module")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's way of choosing adapters; chooses the experts of all layers."""
        super().set_adapter(adapter_names, inference_mode)
        if self.expert_state is not None:
            self.expert_state.choose([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's switch for all adapters."""
        super().enable_adapters(enabled)
        if self.expert_state is not None and not enabled:
            self.expert_state.choose(())

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter from this layer (PEFT calls it for every layer)."""
        super().delete_adapter(adapter_name)
        if self.expert_state is not None:
            self.expert_state.forget(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: no weight of the wrapped module could hold a filtered path around it."""
        del safe_merge, adapter_names
        raise ValueError("an expert around a whole module cannot be merged into its weights")

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self._widths(module)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = next(base_layer.parameters())  # the module has no weight of its own
        return weight.device, weight.dtype

    def __repr__(self) -> str:
        return "expert." + super().__repr__()


def _weight(part: nn.ModuleDict, name: str) -> Tensor:
    weight = part[name].weight
    assert isinstance(weight, Tensor)
    return weight


def custom_modules(denoiser: Denoiser) -> dict[type[nn.Module], Any]:
    """The argument of `LoraConfig._register_custom_module`."""
    layer = partial(ExpertLayer, widths=denoiser.widths)
    sites = (block.get_submodule(name) for _, block in denoiser.blocks for name in denoiser.sites.values())
    return {type(unwrapped(site)): layer for site in sites}


def unwrapped(site: nn.Module) -> nn.Module:
    """The transformer's own module at a site."""
    return site.base_layer if isinstance(site, ExpertLayer) else site


def expert_layers(denoiser: Denoiser, config: ExpertConfig) -> dict[str, Any]:
    """The modules of every block where an expert sits, wrapped or not, by their names in the transformer."""
    return {
        f"{block_name}.{name}": block.get_submodule(name)
        for block_name, block in denoiser.blocks
        for name in site_names(denoiser, config)
    }


def site_names(denoiser: Denoiser, config: ExpertConfig) -> list[str]:
    """Names within a block of the modules that an expert wraps."""
    return [name for place, name in denoiser.sites.items() if place in config.places]


# Part of the weights' names; PEFT recognises its weights by "lora_".
_NAME = re.compile(r"(?!lora_)[A-Za-z][A-Za-z0-9_-]*", re.ASCII)


def add_expert(transformer: Any, name: str, config: ExpertConfig, dtype: torch.dtype | None = None) -> None:
    """Add an expert as a named PEFT adapter. Only it is then active and trainable; its correction is zero.

    Args:
        transformer: not compiled, wrapped or quantised; may hold other experts and adapters.
        name: new; letters, digits, "_" and "-".
        config: the expert's place, rank, filter and band.
        dtype: dtype of its weights; default the wrapped modules'. float32 beside a bfloat16 base keeps small
            updates.

    Raises:
        ValueError: for an existing or invalid name, or a transformer that cannot take an expert.
    """
    inject(transformer, name, config, dtype)
    train_only(transformer, name)


def inject(transformer: Any, name: str, config: ExpertConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Add an expert, frozen and active; other adapters stay. Returns the layers that hold it, by name."""
    check_can_take(transformer, name)
    denoiser = denoiser_of(transformer)
    lora = lora_config(denoiser, config)
    lora._register_custom_module(custom_modules(denoiser))
    trained = {id(p): p.requires_grad for n, p in transformer.named_parameters() if "lora_" in n}
    others = {
        module: list(module.active_adapters)
        for module in transformer.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ExpertLayer)
    }
    with warnings.catch_warnings():  # several adapters are intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        transformer.add_adapter(lora, name)
    # diffusers has disabled every other adapter, even a plain LoRA that adapts the base.
    for module, names in others.items():
        module.set_adapter(names)
    state = install(transformer)
    state.configs[name] = config
    layers = expert_layers(denoiser, config)
    for layer in layers.values():
        layer.expert_state = state
        layer.lora_A[name].to(dtype)
        layer.lora_B[name].to(dtype)
    for n, parameter in transformer.named_parameters():
        if "lora_" in n:
            parameter.requires_grad_(trained.get(id(parameter), False))
    activate(transformer, name)
    return layers


def lora_config(denoiser: Denoiser, config: ExpertConfig, **options: Any) -> LoraConfig:
    """PEFT's configuration of an expert."""
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=site_names(denoiser, config), **options)


def check_can_take(transformer: Any, name: str) -> None:
    """Raise one clear line when this transformer cannot take an expert of this name."""
    try:
        denoiser_of(transformer)
    except ValueError:
        raise ValueError(
            "experts go into a backbone's transformer before it is wrapped or compiled, "
            f"got {type(transformer).__name__}"
        ) from None
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"expert {name!r}: the transformer has an adapter of this name already")
    if not _NAME.fullmatch(name):
        raise ValueError(f"expert name {name!r}: expected letters, digits, '_' and '-', not starting with lora_")
    floating = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    kinds = {p.dtype for p in transformer.parameters()} - floating
    if kinds or getattr(transformer, "hf_quantizer", None) is not None:
        found = ", ".join(sorted(map(str, kinds))) or "a quantiser"
        raise ValueError(f"the transformer is quantised ({found}): experts need float16, bfloat16 or float32 weights")


def expert_parameters(transformer: Any, name: str) -> list[nn.Parameter]:
    """A and B of an expert, block by block.

    Raises:
        ValueError: for an unknown expert.
    """
    config = state_of(transformer, name).configs[name]
    layers = expert_layers(denoiser_of(transformer), config).values()
    return [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]


def train_only(transformer: Any, name: str | None) -> None:
    """Train one expert and freeze everything else, or everything when None; independent of `activate`.

    Needed wherever a transformer holds two adapters: PEFT leaves both trainable.

    Raises:
        ValueError: for an unknown expert.
    """
    chosen = [] if name is None else expert_parameters(transformer, name)
    transformer.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


@contextmanager
def experts_set_aside(transformer: Any) -> Iterator[None]:
    """Take the experts' layers out of the transformer inside this context; no weight is touched.

    Inside, module names and the state dict are those of a transformer without experts, as diffusers' LoRA loading
    and `save_pretrained` expect.
    """
    denoiser = denoiser_of(transformer)
    taken = [
        (block, name, layer)
        for _, block in denoiser.blocks
        for name in denoiser.sites.values()
        if isinstance(layer := block.get_submodule(name), ExpertLayer)
    ]
    experts = expert_names(transformer)
    configs = {name: transformer.peft_config.pop(name) for name in experts}
    for block, name, layer in taken:
        block.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for block, name, layer in taken:
            block.set_submodule(name, layer)
        if configs:  # diffusers drops the whole table together with the last LoRA
            left = getattr(transformer, "peft_config", {})
            transformer.peft_config = configs | left
            transformer._hf_peft_config_loaded = True
