"""The sizes of video that a backbone can make, known from its configuration files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from luve_lightning.models.folders import cannot_load, is_local, read_config

# The two sizes of a cascade may differ in shape by a few percent, as the paper's 720x1280 and 1472x2560 do, and by
# what rounding to whole tokens makes of small ones.
_SHAPE_TOLERANCE = 0.1


@dataclass(frozen=True)
class SizeRules:
    """What pixels and frames of a video must be multiples of.

    Attributes:
        step: height and width are multiples of it: what one token covers, 16 for Wan2.1.
        frames: the number of frames is a multiple of it plus one: 4 for Wan2.1.
    """

    step: int
    frames: int

    @classmethod
    def from_pretrained(cls, backbone: str | Path) -> SizeRules:
        """Read the configurations of a backbone's VAE and transformer; no weights are loaded.

        Raises:
            FileNotFoundError: when one of them cannot be had.
        """
        local = is_local(backbone)
        found = {}
        for part, kind in (("vae", AutoencoderKLWan), ("transformer", WanTransformer3DModel)):
            if local and (Path(backbone) / part / "config.json").is_file():
                read_config(backbone, part)
            try:
                found[part] = kind.load_config(str(backbone), subfolder=part, local_files_only=local)
            except OSError as error:
                raise cannot_load(backbone, part, error) from error
        vae, patch = found["vae"], found["transformer"].get("patch_size", (1, 2, 2))
        spatial, temporal = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
        return cls(spatial * patch[1], temporal * patch[0])

    def nearest(self, pixels: float) -> int:
        """The possible height or width nearest to a number of pixels."""
        return max(self.step, round(pixels / self.step) * self.step)

    def check(self, num_frames: int, **sides: int) -> None:
        """Refuse what the models would silently crop.

        Args:
            num_frames: of the video.
            sides: heights and widths by the names of their options.

        Raises:
            ValueError: with the option and the nearest possible values.
        """
        for name, pixels in sides.items():
            if pixels < self.step or pixels % self.step:
                low = max(self.step, pixels // self.step * self.step)
                raise ValueError(
                    f"{name} {pixels}: expected a multiple of {self.step}, nearest are {low} and {low + self.step}"
                )
        if num_frames < 1 or (num_frames - 1) % self.frames:
            low = max(0, (num_frames - 1) // self.frames) * self.frames + 1
            raise ValueError(
                f"num_frames {num_frames}: expected {self.frames}k + 1, nearest are {low} and {low + self.frames}"
            )

    def check_cascade(self, motion: tuple[int, int], output: tuple[int, int]) -> None:
        """Refuse an output that is smaller than its motion or of another shape.

        Args:
            motion: height and width of the first stage.
            output: height and width of the video.

        Raises:
            ValueError: with values that fit.
        """
        height, width = motion
        if height > output[0] or width > output[1]:
            raise ValueError(
                f"motion_height x motion_width {height}x{width}: larger than the video's {output[0]}x{output[1]}"
            )
        same = output[1] * height / output[0]  # the width of exactly this shape
        if abs(width - same) > max(_SHAPE_TOLERANCE * same, self.step):
            scale = (height * width / (output[0] * output[1])) ** 0.5
            fits = [self.nearest(side * scale) for side in output]
            raise ValueError(
                f"motion_height x motion_width {height}x{width}: another shape than the video's "
                f"{output[0]}x{output[1]}; {fits[0]}x{fits[1]} would fit"
            )
