"""The backbone's diffusion transformer: loading it, and refusing what it would crop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from luve_lightning.models.folders import is_local, load_whole, read_config, saving


def load_transformer(backbone: str | Path, dtype: torch.dtype | None = None) -> WanTransformer3DModel:
    """Load `transformer/` of a backbone, or a folder saved by `WanTransformer3DModel.save_pretrained`.

    Args:
        backbone: a local pipeline folder, the transformer's own folder, or a hub id.
        dtype: dtype of the weights; float32 when None. diffusers keeps norms and the time embedding in float32.

    Raises:
        FileNotFoundError: when it cannot be had.
        ValueError: when its files are damaged or of another model.
    """
    folder = Path(backbone)
    local = is_local(backbone)
    own = local and (folder / "config.json").is_file()
    if local and not own and not (folder / "transformer" / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone {backbone}: no transformer/config.json there; expected a diffusers pipeline folder or a "
            "transformer's own"
        )
    part = "" if own else "transformer"
    if local:
        kind = read_config(folder, part)["_class_name"]
        if kind != "WanTransformer3DModel":
            raise FileNotFoundError(f"backbone {backbone}: holds a {kind}, expected a WanTransformer3DModel")
    transformer: WanTransformer3DModel = load_whole(
        WanTransformer3DModel,
        backbone,
        part,
        torch_dtype=dtype or torch.float32,
        local_files_only=local,
    )
    return transformer


def save_transformer(transformer: WanTransformer3DModel, folder: str | Path, dtype: torch.dtype) -> None:
    """Save a transformer with all its weights in one dtype; `load_transformer` widens what must be float32.

    Args:
        transformer: its weights are cast in place.
        folder: where to.
        dtype: on disk.
    """
    # Not `.to(dtype)`: diffusers warns of the modules that it keeps in float32, which concerns running only.
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    with saving(folder) as new:
        transformer.save_pretrained(new)


def check_token_grid(
    transformer: WanTransformer3DModel, latents: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Token frames, rows and columns of latents of this size.

    Raises:
        ValueError: for a size of which the transformer would silently drop a row, a column or a frame.
    """
    patch = transformer.config.patch_size
    for name, n, p in zip(("frames", "height", "width"), latents, patch, strict=True):
        if n < p or n % p:
            low = max(p, n // p * p)
            raise ValueError(
                f"latent {name} {n}: the transformer takes multiples of {p}, nearest are {low} and {low + p}"
            )
    t, h, w = (n // p for n, p in zip(latents, patch, strict=True))
    return t, h, w


def check_flow(scheduler: Any, backbone: str | Path) -> None:
    """Refuse a backbone's scheduler that is not of flow matching, as a `scheduler_config.json` without values gives.

    Raises:
        ValueError: with what is missing.
    """
    if not (scheduler.config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch")):
        raise ValueError(
            f"backbone {backbone}: its scheduler/ is {type(scheduler).__name__} without use_flow_sigmas; expected "
            "one of flow matching"
        )


def flow_scheduler(shift: float) -> UniPCMultistepScheduler:
    """The scheduler of Wan2.1's pipelines at a shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
