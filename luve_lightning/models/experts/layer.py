"""The PEFT layer of an expert: a filtered LoRA around a whole attention or feed-forward module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from luve_lightning.functional.frequency import Grid, filter_tokens
from luve_lightning.models.backbones import Denoiser
from luve_lightning.models.experts.config import ExpertConfig
from luve_lightning.models.experts.routing import ActiveExpert, Call, ExpertState, TokenSplit


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
                call = self.expert_call
                output = self._corrected(output, self.hidden(x, name, expert, call.grid, call.split), name)
        return output

    def hidden(
        self, x: Tensor, name: str, expert: ActiveExpert, grid: Grid, split: TokenSplit | None = None
    ) -> Tensor:
        """The input of B: filter(A(x)), B x N x rank, weighted per sample."""
        hidden = nn.functional.linear(x, _weight(self.lora_A, name).to(x.dtype))
        if expert.filter is not None:
            # Only these `rank` channels of a split clip travel.
            whole = hidden if split is None else split.gather(hidden)
            whole = filter_tokens(whole, grid, expert.filter, expert.matrices)
            hidden = whole if split is None else split.own(whole)
        if expert.weights is not None:
            hidden = hidden * expert.weights.to(hidden.dtype)[:, None, None]
        return hidden

    def _corrected(self, output: Tensor, hidden: Tensor, name: str) -> Tensor:
        """Product and sum in one kernel; the correction itself is never stored."""
        weight = _weight(self.lora_B, name).to(output.dtype)
        flat = torch.addmm(
            output.flatten(0, 1),
            hidden.flatten(0, 1).to(output.dtype),
            weight.t(),
            alpha=self.scaling[name],
        )
        return flat.view_as(output)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add one adapter to this layer (PEFT calls it)."""
        if config.use_dora or config.lora_bias or config.lora_dropout:
            raise ValueError(
                f"expert {adapter_name}: DoRA, bias and dropout do not go with a filter around a module"
            )
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
