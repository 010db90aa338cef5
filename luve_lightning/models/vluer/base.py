"""What every VLUer has: files of its own, and a check of what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from luve_lightning.functional.interpolation import Size3d, check_size
from luve_lightning.models.folders import load_whole, read_config, saving


class BaseVLUer(ModelMixin, ConfigMixin):
    """A model that upsamples normalised video latents; its configuration has `latent_channels`.

    A subclass is named in `luve_lightning.models.vluer`, where `load_vluer` finds it.
    """

    _supports_gradient_checkpointing = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see diffusers.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: when files are damaged, or hold other weights than the configuration requires.
        """
        if kwargs.pop("output_loading_info", False):
            return super().from_pretrained(str(pretrained_model_name_or_path), output_loading_info=True, **kwargs)
        if (Path(pretrained_model_name_or_path) / "config.json").is_file():
            read_config(pretrained_model_name_or_path, "")
        return load_whole(cls, pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "", **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the model for `from_pretrained`, atomically; see diffusers."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with saving(save_directory) as new:
            super().save_pretrained(str(new), **kwargs)

    def forward(self, latents: Tensor, size: Size3d) -> Tensor:
        """Upsample latents B x C x T x h x w to `size`: latent frames, height and width."""
        raise NotImplementedError

    def check_grids(self, given: Size3d, wanted: Size3d) -> None:
        """Refuse latent sizes that the model cannot take or give; by default it takes all.

        Args:
            given: latent frames, height and width of the input.
            wanted: those of the output.

        Raises:
            ValueError: for such a size.
        """

    def check_input(self, latents: Tensor, size: Size3d) -> Size3d:
        """The output size as three integers.

        Raises:
            ValueError: for latents of a wrong rank or channel count, an empty axis, or a size below 1.
        """
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must be B x {channels} x T x h x w, got shape {tuple(latents.shape)}")
        if 0 in latents.shape:
            raise ValueError(f"latents have an empty axis: shape {tuple(latents.shape)}")
        return check_size(size)
