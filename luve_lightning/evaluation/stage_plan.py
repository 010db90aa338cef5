"""What is planned, and what a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from luve_lightning.evaluation.stage_programs import DenoisingStage, UpsampleMethod
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.pipelines.denoise import Guidance
from luve_lightning.pipelines.expert_choice import Experts


@dataclass(frozen=True)
class VideoPlan:
    """The video to plan, and how it is made; names are those of `LuVePipeline` and its `SpeedOptions`.

    Attributes:
        size: frames, height and width in pixels.
        motion: of the first stage; None makes the video at full size at once, without a cascade.
        steps: of the whole schedule.
        skip_steps: how many of them refinement leaves out.
        guidance: of denoising.
        refine_guidance: of the third stage; `guidance` when None.
        upsampling: the second stage's method.
        experts: which of the refiner's experts take part.
        tile: of the decoder, in latents; None decodes whole frames.
        offload: only the model that runs is on the GPU.
    """

    size: Size3d
    motion: Size3d | None
    steps: int = 50
    skip_steps: int = 10
    guidance: Guidance = field(default_factory=Guidance)
    refine_guidance: Guidance | None = None
    upsampling: UpsampleMethod = "vluer"
    experts: Experts = "all"
    tile: tuple[int, int] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.skip_steps <= self.steps:
            raise ValueError(
                f"expected steps >= 1 and 0 <= skip_steps <= steps, got steps {self.steps} and skip_steps "
                f"{self.skip_steps}"
            )

    def guidance_of(self, stage: DenoisingStage) -> Guidance:
        """Guidance in a stage."""
        return (self.refine_guidance if stage == "refine" else None) or self.guidance


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes. Memory is in bytes.

    Attributes:
        stage: "text", "motion" (or "direct"), "upsample", "refine", "decode".
        latents: frames, height and width of its result, or of what it decodes; None for text.
        tokens: of the transformer in one forward pass.
        steps: of denoising.
        forwards: passes of the transformer, or of the text encoder.
        flops_per_forward: floating-point operations of one.
        flops: of the stage.
        weights: of the models on the device.
        activations: what the stage allocates at its peak.
        workspace: of cuBLAS and, where they count, of attention and convolutions.
        peak: the sum of the three.
        terms: what the activations are made by, the largest first.
        experts: denoising steps by expert; "none" where the transformer runs alone.
        seconds: estimated; None without a GPU's speed.
    """

    stage: str
    latents: Size3d | None
    tokens: int | None
    steps: int
    forwards: int
    flops_per_forward: int
    flops: int
    weights: int
    activations: int
    workspace: int
    peak: int
    terms: dict[str, int]
    experts: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)
