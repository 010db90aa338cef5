"""The nodes: where ComfyUI keeps models, its devices and its LATENT dictionaries."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import folder_paths
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from torch import Tensor

from .upsampler import Upsampler, load, resized_mask

FOLDERS = "vluer"
"""Key of the folders of VLUers, also in extra_model_paths.yaml."""
VLUER = "LUVE_VLUER"
"""Type of the link between the nodes."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = 16384

folder_paths.add_model_folder_path(FOLDERS, str(Path(folder_paths.models_dir) / FOLDERS))


def vluers() -> dict[str, Path]:
    """Folders of saved VLUers by name; of two with one name the first counts, as everywhere in ComfyUI."""
    found: dict[str, Path] = {}
    for parent in map(Path, folder_paths.get_folder_paths(FOLDERS)):
        for config in sorted(parent.glob("*/config.json")):
            found.setdefault(config.parent.name, config.parent)
    return found


def folder_of(name: str) -> Path:
    """The folder of a VLUer.

    Raises:
        FileNotFoundError: when there is none of this name.
    """
    found = vluers()
    if name not in found:
        places = ", ".join(folder_paths.get_folder_paths(FOLDERS))
        raise FileNotFoundError(f"no VLUer {name} in {places}; there are {', '.join(found) or 'none'}")
    return found[name]


class LoadVLUer:
    """Loads a VLUer from a folder under models/vluer."""

    CATEGORY = "LuVe"
    DESCRIPTION = "Load a VLUer, ours or the converted released one, from a folder under models/vluer."
    FUNCTION = "load"
    RETURN_TYPES = (VLUER,)
    RETURN_NAMES = ("vluer",)
    OUTPUT_TOOLTIPS = ("For LuVe Upsample Latent and LuVe Upsample Latent By.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        where = "A folder with a VLUer's config.json and weights, under models/vluer."
        weights = "Precision of the weights; auto is bfloat16 where the device is good at it."
        return {
            "required": {
                "vluer": (list(vluers()), {"tooltip": where}),
                "dtype": (["auto", *DTYPES], {"default": "auto", "tooltip": weights}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, vluer: str, dtype: str) -> str:
        """Another text after the folder's files were written anew, so that ComfyUI loads them again."""
        files = (file for file in folder_of(vluer).rglob("*") if file.is_file())
        return " ".join(str(file.stat().st_mtime_ns) for file in sorted(files))

    def load(self, vluer: str, dtype: str = "auto") -> tuple[Upsampler]:
        """The VLUer of this name.

        Raises:
            FileNotFoundError: no such folder.
            ImportError: without luve-lightning.
            ValueError: when files are damaged.
        """
        if find_spec("luve_lightning") is None:
            raise ImportError("luve-lightning is not installed for ComfyUI's Python; see the README of these nodes")
        if dtype == "auto":
            good = model_management.should_use_bf16(model_management.get_torch_device())
            dtype = "bfloat16" if good else "float32"
        return (load(folder_of(vluer), DTYPES[dtype]),)


class _Upsampling:
    """What both upsampling nodes share."""

    CATEGORY = "LuVe"
    FUNCTION = "upsample"
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("samples",)
    INPUTS: ClassVar[dict[str, Any]] = {
        "samples": ("LATENT", {"tooltip": "What a sampler or a VAE made, of images or videos."}),
        "vluer": (VLUER, {"tooltip": "From LuVe Load VLUer."}),
    }

    @staticmethod
    def run(samples: dict[str, Any], vluer: Upsampler, size: tuple[int, int, int]) -> tuple[dict[str, Any]]:
        """A LATENT dictionary of this size; what else it holds is kept, a noise mask resized."""
        latents = samples["samples"]
        vluer.check_size(latents, size)
        device, resting = model_management.get_torch_device(), model_management.intermediate_device()
        model_management.free_memory(vluer.memory(size), device)
        bar, done = ProgressBar(len(latents)), []
        try:
            vluer.to(device)
            for latent in latents.split(1):  # one at a time: memory does not grow, and a run can be interrupted
                model_management.throw_exception_if_processing_interrupted()
                out: Tensor = vluer(latent.to(device), size)
                done.append(out.to(resting, latents.dtype))
                bar.update(1)
        finally:
            vluer.to(model_management.unet_offload_device())
            model_management.soft_empty_cache()
        result = {**samples, "samples": torch.cat(done)}
        if samples.get("noise_mask") is not None:
            result["noise_mask"] = resized_mask(samples["noise_mask"], *size[1:])
        return (result,)


class UpsampleLatent(_Upsampling):
    """Upsamples latents to a height and width in pixels."""

    DESCRIPTION = "Upsample latents with a VLUer to a height and width in pixels. Frames stay as many."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        sides = {"min": 8, "max": LARGEST, "step": 8, "tooltip": "Pixels of the decoded video."}
        return {
            "required": {
                **cls.INPUTS,
                "width": ("INT", {"default": 2560, **sides}),
                "height": ("INT", {"default": 1472, **sides}),
            }
        }

    def upsample(self, samples: dict[str, Any], vluer: Upsampler, width: int, height: int) -> tuple[dict[str, Any]]:
        """The latents of a video of this size.

        Raises:
            ValueError: for latents of another kind, or a size that cannot be.
        """
        vluer.check(samples["samples"])
        return self.run(samples, vluer, vluer.size(samples["samples"], height, width))


class UpsampleLatentBy(_Upsampling):
    """Upsamples latents by a factor."""

    DESCRIPTION = "Upsample latents with a VLUer by a factor in height and width. Frames stay as many."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs."""
        range_ = {"default": 2.0, "min": 0.1, "max": 8.0, "step": 0.05, "round": 0.001}
        told = {"tooltip": "Of height and width; VLUers are trained on 1.5 to 3."}
        return {"required": {**cls.INPUTS, "factor": ("FLOAT", {**range_, **told})}}

    def upsample(self, samples: dict[str, Any], vluer: Upsampler, factor: float) -> tuple[dict[str, Any]]:
        """The latents of a video this many times as high and wide.

        Raises:
            ValueError: for latents of another kind, or a factor that gives no whole latents.
        """
        vluer.check(samples["samples"])
        return self.run(samples, vluer, vluer.size_by(samples["samples"], factor))
