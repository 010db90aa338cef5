"""Every option of the cascade, once, with its default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from luve_lightning.cascade.refinement import Refinement, refinement_method
from luve_lightning.cascade.upsampling import UpsamplingMethod, upsampling_method
from luve_lightning.functional.interpolation import Size3d
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import Sampler, SizeRules, check_sampler

_VERSION = 1  # version of a video's recipe; raise it when the same recipe gives other pixels


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = v_uncond + scale * (v_cond - v_uncond), in an interval of noise levels.

    Outside the interval, and with scale 1 everywhere, it is v_cond alone: half the work. Leaving out the most and
    the least noise often costs no quality (arXiv 2404.07724).

    Attributes:
        scale: >= 1; 1 is no guidance. LuVe (arXiv 2602.11564) uses 5 in both stages.
        low: lowest guided sigma; sigmas are the scheduler's, shifted, in [0, 1].
        high: highest guided sigma; both ends belong to the interval.
        batched: both predictions in one forward pass of twice the batch: faster where a GPU is not full, with
            twice the activations. Equal up to rounding.
    """

    scale: float = 5.0
    low: float = 0.0
    high: float = 1.0
    batched: bool = False

    def __post_init__(self) -> None:
        if not (self.scale >= 1 and math.isfinite(self.scale)):
            raise ValueError(f"guidance scale {self.scale}: expected a number >= 1, where 1 is no guidance")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"guidance from sigma {self.low} to {self.high}: expected 0 <= low <= high <= 1")

    @classmethod
    def of(cls, guidance: Guidance | float) -> Guidance:
        """A Guidance, given as one or as its scale alone."""
        return guidance if isinstance(guidance, Guidance) else cls(float(guidance))

    def at(self, sigma: float) -> bool:
        """Whether a step at this sigma is guided; compared in float32, like the scheduler's sigmas."""
        return self.scale > 1 and bool(np.float32(self.low) <= np.float32(sigma) <= np.float32(self.high))

    def recipe(self) -> dict[str, Any]:
        """What decides the result; batched or not, results differ only by rounding."""
        return {key: value for key, value in asdict(self).items() if key != "batched"}


@dataclass(frozen=True)
class SpectrumSwitch:
    """When a video's low frequencies have settled.

    LuVe (arXiv 2602.11564) hands over at a fixed sigma and names an adaptive one as future work; this is our reading.
    Every step predicts the clean latents x0. With P the power of their low band and l = log((1 - sigma) / sigma), the
    logarithm of the ratio of signal to noise, the rate at which the band still changes is

        rate = sqrt(P(x0 - previous x0) / P(x0)) / (l - previous l),

    the same whatever the number of steps. The band has settled when the rate was at most `rate` at `patience` steps one
    after another. `luve spectra` compares with the last prediction, which is not known yet while denoising. The
    defaults were chosen on the mini world, where they hand over between the switches 0.8 and 0.9 that a table tried.

    Attributes:
        rate: > 0, of the band's amplitude per e-fold of signal to noise.
        patience: steps, >= 1.
        band: upper end of the low band as a fraction of Nyquist, in (0, 1]; the default is that of `luve spectra`.
        low: sigma from which on the high-frequency expert acts in any case.
        high: sigma above which it never does.
        no_cache: why there may be no step-to-step cache.
    """

    rate: float = 0.7
    patience: int = 2
    band: float = 0.25
    low: float = 0.7
    high: float = 0.95
    no_cache: ClassVar[str] = "switch spectrum: a cache repeats predictions from step to step, which would look settled"

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"switch_options.rate: expected a number > 0, got {self.rate}")
        if self.patience < 1:
            raise ValueError(f"switch_options.patience: expected at least 1 step, got {self.patience}")
        if not 0 < self.band <= 1:
            raise ValueError(f"switch_options.band: expected a fraction of Nyquist in (0, 1], got {self.band}")
        if not 0 < self.low <= self.high < 1:
            raise ValueError(
                f"switch_options: low {self.low} and high {self.high}: expected 0 < low <= high < 1, in sigma"
            )


@dataclass(frozen=True)
class CascadeOptions:
    """Options of one video.

    Attributes:
        height: Height of the video in pixels; a multiple of 16 for Wan2.1.
        width: Width of the video in pixels; likewise.
        num_frames: Number of frames; 4k + 1 for Wan2.1. 1 makes a picture, a PNG.
        motion_height: Height of the first stage; default height / scale, rounded to a possible size.
        motion_width: Width of the first stage; default width / scale, rounded to a possible size.
        scale: How many times smaller the first stage is, unless its size is given.
        cascade: False makes the video in one stage at full size.
        upsampling: Method of the second stage: vluer, or the paper's baselines latent and rgb, which need no
            VLUer.
        refinement: Method of the third stage: luve, or a rival's.
        refinement_options: Its own options by name; default the published ones.
        steps: Denoising steps of the whole schedule.
        skip_steps: How many of them the third stage skips: 5 in the paper, 10 in its released checkpoints.
        guidance: Classifier-free guidance of all stages: scale (1 is none), the interval of sigma, batched or not.
        refine_guidance: Guidance of the third stage, if different.
        shift: Shift of the schedule; default the backbone's own.
        sampler: What steps through the schedule: backbone is its own scheduler, for Wan2.1 UniPC; euler is that of
            DiffSynth-Studio, first-order steps from shift(1 - i / steps) with the transformer's timesteps in bfloat16.
        switch: Sigma at which the low-frequency expert hands over; default where the experts' own bands meet.
            spectrum decides for each video, by when its low frequencies have settled.
        switch_options: When they count as settled, for switch spectrum.
        length: Number of tokens to pad or cut a prompt to; default the tokenizer's own, at most Wan's 512.
    """

    height: int
    width: int
    num_frames: int = 49
    motion_height: int | None = None
    motion_width: int | None = None
    scale: float = 2.0
    cascade: bool = True
    upsampling: str = "vluer"
    refinement: str = "luve"
    refinement_options: dict[str, Any] | None = None
    steps: int = 50
    skip_steps: int = 5
    guidance: Guidance = field(default_factory=Guidance)
    refine_guidance: Guidance | None = None
    shift: float | None = None
    sampler: Sampler = "backbone"
    switch: float | Literal["spectrum"] | None = None
    switch_options: SpectrumSwitch = field(default_factory=SpectrumSwitch)
    length: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a number > 0, got {self.scale}")
        skipped = self.skip_steps if self.cascade else 0
        if self.steps < 1 or not 0 <= skipped <= self.steps:
            raise ValueError(
                f"steps {self.steps} and skip_steps {self.skip_steps}: expected at least 1 step, and 0 to all skipped"
            )
        if self.length is not None and self.length < 1:
            raise ValueError(f"length: expected at least 1 token, got {self.length}")
        if isinstance(self.switch, str) and self.switch != "spectrum":
            raise ValueError(f"switch: expected a sigma between 0 and 1 or spectrum, got {self.switch!r}")
        if not isinstance(self.switch, str | None) and not 0 < self.switch < 1:
            raise ValueError(f"switch: expected a sigma between 0 and 1, got {self.switch}")
        if self.switch != "spectrum" and self.switch_options != SpectrumSwitch():
            raise ValueError(f"switch_options: they are for switch spectrum, got switch {self.switch}")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a number greater than 0, got {self.shift}")
        check_sampler(self.sampler)
        upsampling_method(self.upsampling)
        if self.own_refinement and not self.cascade:
            raise ValueError(
                f"refinement {self.refinement}: cascade is false, and there is no third stage to refine in"
            )

    @property
    def method(self) -> UpsamplingMethod:
        """The upsampling method."""
        return upsampling_method(self.upsampling)

    @property
    def refined_by(self) -> Refinement:
        """The refinement method, with its options."""
        return refinement_method(self.refinement, self.refinement_options)

    @property
    def handover(self) -> float | SpectrumSwitch | None:
        """The switch, as `expert_chooser` takes it."""
        return self.switch_options if isinstance(self.switch, str) else self.switch

    def check_cache(self) -> None:
        """Refuse what a step-to-step cache would spoil.

        Raises:
            ValueError: in one line.
        """
        if self.switch == "spectrum":
            raise ValueError(SpectrumSwitch.no_cache)
        if self.cascade and (told := self.refined_by.no_cache):
            raise ValueError(told)

    @property
    def refining(self) -> Guidance:
        """Guidance of the third stage."""
        return self.refine_guidance or self.guidance

    @property
    def size(self) -> Size3d:
        """Frames, height and width of the video in pixels."""
        return self.num_frames, self.height, self.width

    @property
    def motion(self) -> Size3d:
        """Frames, height and width of the first stage in pixels, after `resolved`."""
        assert self.motion_height is not None
        assert self.motion_width is not None
        return self.num_frames, self.motion_height, self.motion_width

    def resolved(
        self, rules: SizeRules, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> CascadeOptions:
        """The options with every size given; a video of another size keeps the scale to its first stage.

        `rules` are the possible sizes; the others are the video's own, where they differ from these options'.

        Raises:
            ValueError: for an impossible size, with the nearest possible ones.
        """
        size = {"height": self.height if height is None else height, "width": self.width if width is None else width}
        frames = self.num_frames if num_frames is None else num_frames
        motion: dict[str, int] = {}
        for name, pixels in size.items():
            given, own = getattr(self, f"motion_{name}"), getattr(self, name)
            if not self.cascade:
                motion[f"motion_{name}"] = pixels
            elif given is not None and pixels == own:
                motion[f"motion_{name}"] = given
            else:
                motion[f"motion_{name}"] = rules.nearest(pixels / self.scale if given is None else pixels * given / own)
        rules.check(frames, **size)
        rules.check(frames, **motion)
        sizes: dict[str, Any] = size | motion
        return replace(self, num_frames=frames, **sizes)

    def recipe(self) -> dict[str, Any]:
        """What decides a video's pixels, besides its prompt, seed and sizes: part of a stored recipe."""
        return {
            "upsampling": self.upsampling,
            "cascade": self.cascade,
            "steps": self.steps,
            "skip_steps": self.skip_steps,
            "guidance": self.guidance.recipe(),
            "refine_guidance": None if self.refine_guidance is None else self.refine_guidance.recipe(),
            "shift": self.shift,
            "switch": self.switch,
            "length": self.length,
            **self.own_sampler,
            **self.own_refinement,
            **({"switch_options": asdict(self.switch_options)} if self.switch == "spectrum" else {}),
        }

    @property
    def own_sampler(self) -> dict[str, Any]:
        """The sampler, where it is not the backbone's: what was stored before there were others is found again."""
        return {} if self.sampler == "backbone" else {"sampler": self.sampler}

    @property
    def own_refinement(self) -> dict[str, Any]:
        """The refinement method with all its options, where it is not the default; see `own_sampler`."""
        method = self.refined_by
        if method == refinement_method(CascadeOptions.refinement):
            return {}
        return {"refinement": self.refinement, "refinement_options": method.record()}


def recipe_settings(
    options: CascadeOptions,
    dtype: str,
    cache: Mapping[str, Any] | None,
    models: Mapping[str, str],
    fps: float,
    lossless: bool,
    attention: Attention | None = None,
    decode_half: bool = False,
    encoder_threads: int = 1,
) -> dict[str, Any]:
    """Everything that decides a run's videos besides their prompts, seeds and sizes."""
    # What is saved with a model belongs to the model's identity.
    replaced = {} if attention is None else {"attention": attention.record()}
    halved = {"decode_half": True} if decode_half else {}
    encoded = {} if lossless or encoder_threads == 1 else {"encoder_threads": encoder_threads}
    return {
        "version": _VERSION,
        **options.recipe(),
        "dtype": dtype,
        "cache": cache,
        "models": dict(models),
        "fps": fps,
        "lossless": lossless,
        **replaced,
        **halved,
        **encoded,
    }
