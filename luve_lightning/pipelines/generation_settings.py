"""How the videos of a run are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from luve_lightning.pipelines.denoise import Guidance
from luve_lightning.pipelines.luve_latents import UpsamplingName


@dataclass(frozen=True)
class CascadeSettings:
    """How every video of a run is made.

    Attributes:
        upsampling: "vluer", "latent" or "rgb".
        cascade: False makes the video in one stage at full size, by the refiner if there is one.
        steps: denoising steps of the whole schedule.
        skip_steps: of them that the refinement skips.
        guidance: of every stage.
        refine_guidance: of the refinement; None is `guidance`.
        shift: of the schedule; None is the backbone's.
        switch: sigma from which on the low-frequency expert takes over; None is where the experts' bands meet.
        length: tokens of a prompt; None is the tokenizer's.
        dtype: of the transformers and the text encoder.
        cache: of the step-to-step cache that is in force, what decides its results; None without one.
    """

    upsampling: UpsamplingName = "vluer"
    cascade: bool = True
    steps: int = 50
    skip_steps: int = 5
    guidance: Guidance = field(default_factory=Guidance)
    refine_guidance: Guidance | None = None
    shift: float | None = None
    switch: float | None = None
    length: int | None = None
    dtype: str = "float32"
    cache: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.skip_steps <= self.steps:
            raise ValueError(
                f"steps {self.steps} and skip_steps {self.skip_steps}: expected at least 1 step, and 0 to all skipped"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(f"length: expected at least 1 token, got {self.length}")
        if self.switch is not None and not 0 < self.switch < 1:
            raise ValueError(f"switch: expected a sigma between 0 and 1, got {self.switch}")


def rounded(guidance: Guidance | None) -> dict[str, Any] | None:
    """A guidance by what it decides: batched or not, results differ by rounding only."""
    if guidance is None:
        return None
    return {key: value for key, value in asdict(guidance).items() if key != "batched"}


def described(settings: CascadeSettings) -> dict[str, Any]:
    """Settings as a recipe has them."""
    facts = asdict(settings)
    return facts | {
        "guidance": rounded(settings.guidance),
        "refine_guidance": rounded(settings.refine_guidance),
    }
