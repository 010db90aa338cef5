"""The stages of a rehearsal: each step of the recipe as the command that its user runs, with few clips and steps.

What a stage makes has a name, such as "base", the adapted transformer; later stages need it by that name, as `{base}`
in their values. Several may make the same: what was trained here comes before random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from luve_lightning.ablations.rehearsal_stage import RehearsalStage, StageValues
from luve_lightning.data.video_index import CAPTION, CAPTIONS
from luve_lightning.machine import MEASURED, PROFILED

RehearsalSize = Literal["mini", "2k", "4k"]
Composer = Callable[[Sequence[Path], Sequence[tuple[str, str]]], dict[str, Any]]
"""Composes configuration files and options into one mapping, as the command line does."""

RANDOM = "wan2.1-1.3b"
"""The backbone that is made of random weights, in the size of Wan2.1-1.3B."""
MINI = Path("data/mini/wan")
EXPERIMENTS = Path("experiments")
PROMPT = "A red fox runs through fresh snow at dawn."
LOCAL_SCORER = "luve_lightning.data.scorers.SharpnessExposure"

# The VLUer's steps are short: enough of them that one can be stopped in their middle.
_VLUER_STEPS = {1: 10, 2: 4}
_CLIPS = {"mini": 10, "2k": 6, "4k": 6}
_HELD_OUT = 2  # of the made clips: one validates, one tests
# The mini world's, and the paper's.
_RECIPE_CLIPS = {"mini": 248, "2k": 20_000, "4k": 20_000}


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed.

    Args:
        folder: where everything goes.
        compose: composes configurations.
        backbone: `RANDOM`, "mini", a folder or a hub id.
        size: of the videos, and so of the configurations.
        windows: whether attention is cut into windows.
        data: folder of clips, or an index; None makes a few.
        devices: number of GPUs, or of processes on a CPU.
        gpu: whether there is one.
        steps: of each training.
        video_steps: of the generated video; None as configured.
        clips: number of clips of the whole recipe.
        validate: whether trainings validate, once, on one batch.
        hpsv3: the `luve` of HPS v3's environment, where there is one.
        wandb: whether Weights & Biases is installed.
        measure: whether the GPU's speed is measured.
        profile: whether trainings take two more steps, which tell where a step's time goes.
        video_devices: number of GPUs that share the video.
    """

    folder: Path
    compose: Composer
    backbone: str = "mini"
    size: RehearsalSize = "mini"
    windows: bool = False
    data: Path | None = None
    devices: int = 1
    gpu: bool = False
    steps: int = 4
    video_steps: int | None = None
    clips: int | None = None
    validate: bool = True
    hpsv3: Path | None = None
    wandb: bool = True
    measure: bool = False
    profile: bool = False
    video_devices: int = 1

    @property
    def mini(self) -> bool:
        """Whether the mini world's configurations are run."""
        return self.size == "mini"

    @property
    def recipe_clips(self) -> int:
        """Clips of the whole recipe."""
        return self.clips or _RECIPE_CLIPS[self.size]

    @property
    def caption(self) -> str:
        """Column of the captions: UltraVideo's where its own table is given."""
        return "Summarized Description" if self.data is not None and self.data.suffix == ".csv" else CAPTION

    def given(self) -> dict[str, str]:
        """What is there before anything is run."""
        found = {} if self.backbone == RANDOM else {"backbone": str(MINI) if self.backbone == "mini" else self.backbone}
        if self.data is not None:
            found["clips" if self.data.is_dir() else "index"] = str(self.data)
        return found

    def path(self, *parts: str) -> str:
        """A path in the folder."""
        return str(self.folder.joinpath(*parts))

    def config(self, *names: str) -> tuple[Path, ...]:
        """Configuration files of the recipe."""
        return tuple(EXPERIMENTS / f"{name}.yaml" for name in names)

    def stages(self) -> list[RehearsalStage]:
        """Every stage, each after those that it needs."""
        found = [*self._made(), *self._data(), *self._trainings(), *self._used()]
        return [replace(stage, gpus=self.devices) if stage.verb == "fit" else stage for stage in found]

    # What is there in the beginning

    def _made(self) -> list[RehearsalStage]:
        found = []
        if self.measure:
            values: dict[str, Any] = {"subject": "speed", "output": self.path("speed.jsonl")}
            found.append(RehearsalStage("speed", "bench", values=values, gives={"speed": self.path("speed.jsonl")}))
        if self.backbone == RANDOM:
            values = {"output": self.path("models")}
            if self.windows:
                values["attention"] = self.compose(self._adaptation(), ())["model"]["init_args"]["attention"]
            parts = {"base": "refiner", "lfe": "experts/lfe", "hfe": "experts/hfe"}
            gives = {name: self.path("models", part) for name, part in parts.items()}
            gives |= {name: self.path("models", name) for name in ("backbone", "vluer")}
            found.append(RehearsalStage("models", "random-models", values=values, gives=gives))
        if self.data is None:
            size = {"mini": [192, 192]}.get(self.size, [2160, 3840])
            frames, fps = (33, 16) if self.mini else (53, 24)
            clips = max(_CLIPS[self.size], _HELD_OUT + 2 * self.devices)  # a batch of the VLUer's for each
            values = {"folder": self.path("clips"), "size": size, "clips": clips, "frames": frames}
            values |= {"fps": fps, "stills": 2, "seed": 0}
            found.append(RehearsalStage("material", "", values=values, gives={"clips": self.path("clips")}))
        return found

    # Data

    def _data(self) -> list[RehearsalStage]:
        found = []
        if self.data is None or self.data.is_dir():
            index = self.path("index.parquet")
            values: StageValues = {"sources": ["{clips}"], "output": index}
            found.append(RehearsalStage("index", "index", values=values, needs=("clips",), gives={"index": index}))
        if self.mini:
            found.append(self._precompute("vluer", "pairs", "precompute/mini"))
            variants = self._precompute("variants", "variants", "precompute/mini", "precompute/mini-variants")
            found.append(self._stored_with(variants, "vluer"))
            found.append(self._precompute("experts", "latents", "precompute/mini", "precompute/mini-experts"))
        else:
            more = "precompute/wan2.1-experts" + "-4k" * (self.size == "4k")
            found.append(self._precompute("vluer", "pairs", "precompute/wan2.1"))
            found.append(self._precompute("experts", "latents", "precompute/wan2.1", more))
        return [*found, self._embed(), self._score()]

    def _precompute(self, name: str, gives: str, *configs: str) -> RehearsalStage:
        store = self.path("latents", name)
        values = {"backbone": "{backbone}", "index": "{index}", "store": store, **self._trainer("trainer")}
        if self.mini:
            values["batch_size"] = 1  # with a dozen clips, larger batches say nothing of the later ones
        return RehearsalStage(
            f"precompute-{name}",
            "precompute",
            self.config(*configs),
            values,
            needs=("backbone", "index"),
            gives={gives: store},
            begun=f"latents/{name}/*/*.safetensors",
            least=2,
            record=f"stages/precompute-{name}/{MEASURED}",
            unit="clip",
            units=self.recipe_clips,
        )

    def _stored_with(self, stage: RehearsalStage, other: str) -> RehearsalStage:
        """A stage of precompute with the store of another one."""
        store = self.path("latents", other)
        gives = dict.fromkeys(stage.gives, store)
        begun = f"latents/{other}/*/*.safetensors"
        return replace(stage, values={**stage.values, "store": store}, gives=gives, begun=begun)

    def _embed(self) -> RehearsalStage:
        values: dict[str, Any] = {"backbone": "{backbone}", "index": "{index}", "store": self.path("texts")}
        # Painted clips have many captions, so that batches as large as configured show a steady pace.
        columns = [CAPTION, *CAPTIONS] if self.data is None else [self.caption]
        values |= {"columns": columns, "device": "cuda" if self.gpu else "cpu"}
        if self.mini:
            values["batch_size"] = 8
        if not self.gpu:
            values["dtype"] = "float32"
        return RehearsalStage(
            "embed",
            "embed",
            self.config("embed/mini" if self.mini else "embed/wan2.1"),
            values,
            needs=("backbone", "index"),
            gives={"texts": self.path("texts")},
            begun="texts/*/*.safetensors",
            record=f"stages/embed/{MEASURED}",
            unit="caption",
            units=self.recipe_clips + 1,  # and the empty one
        )

    def _score(self) -> RehearsalStage:
        values: dict[str, Any] = {"index": "{index}", "output": self.path("scores"), "caption": self.caption}
        values |= {"batch_size": 2}
        note = ""
        if not self.mini and self.hpsv3 is None:
            values["scorer"] = {"class_path": LOCAL_SCORER}
            note = "by sharpness and exposure: HPS v3's environment is not there (make setup-hpsv3)"
        return RehearsalStage(
            "score",
            "score",
            self.config("score/mini" if self.mini else "score/ultravideo"),
            values,
            needs=("index",),
            gives={"scores": self.path("scores")},
            begun="scores/*.parquet",
            record=f"stages/score/{MEASURED}",
            unit="clip",
            units=self.recipe_clips,
            note=note,
        )

    # Trainings

    def _trainings(self) -> list[RehearsalStage]:
        data = "data.init_args"
        every = {f"{data}.index": "{index}", f"{data}.backbone": "{backbone}"}
        pairs = {**every, f"{data}.store": "{pairs}", "model.init_args.backbone": "{backbone}"}
        texts = {**every, f"{data}.store": "{latents}", f"{data}.texts": "{texts}"}
        real = not self.mini and not self.gpu
        found = []
        for phase in (1, 2):
            values = {**pairs, "model.init_args.pixel_from_step": 10**9 if phase == 1 else 0}
            values |= {"model.init_args.codec_dtype": "float32"} if real else {}
            config = self.config("vluer/mini" if self.mini else "vluer/wan2.1")
            needs = ("pairs", "variants") if self.mini else ("pairs",)
            stage = self._fit(f"vluer-{phase}", config, values, needs, {"vluer": "vluer"})
            steps = self._steps(self.steps * _VLUER_STEPS[phase])
            last = self._at(config, "model.init_args.pixel_from_step")
            units = last if phase == 1 else (stage.units or 0) - last
            whole = steps["trainer.max_steps"]
            found.append(replace(stage, steps=whole, units=units, values={**stage.values, **steps}))
        captions = {**texts, f"{data}.columns": [self.caption]}
        compiled = {"model.init_args.compile": None} if real else {}
        adaptation = {**captions, "model.init_args.backbone": "{backbone}", **compiled}
        # The best beside the last would be another 17 GB.
        adaptation["callbacks.checkpoints.init_args.monitor"] = None
        needs = ("latents", "texts")
        found.append(self._fit("adaptation", self._adaptation(), adaptation, needs, {"base": "export"}))
        expert = {**captions, "model.init_args.backbone": "{base}", **compiled, **self._selection()}
        expert |= {"model.init_args.dtype": "float32"} if real else {}
        for name in ("lfe", "hfe"):
            stage = self._fit(name, self._expert(name), expert, (*needs, "base"), {name: ""})
            found.append(replace(stage, without={"scores": {f"{data}.selection": None}}))
        return found

    def _fit(
        self,
        name: str,
        configs: tuple[Path, ...],
        values: StageValues,
        needs: tuple[str, ...],
        gives: Mapping[str, str],
    ) -> RehearsalStage:
        steps = self._steps(self.steps)
        own = {"trainer.default_root_dir": self.path("runs", name), **self._trainer("trainer"), **steps}
        if not self.wandb:
            own |= {"loggers.wandb": None, "callbacks.record": None}
        return RehearsalStage(
            name,
            "fit",
            configs,
            {**values, **own},
            needs=("backbone", "index", *needs),
            gives={key: self.path("runs", name, *([folder] if folder else [])) for key, folder in gives.items()},
            begun=f"runs/{name}/{MEASURED}",
            record=f"runs/{name}/{MEASURED}",
            bulky=(f"runs/{name}/checkpoints",),
            unit="step",
            units=self._at(configs, "trainer.max_steps"),
            steps=steps["trainer.max_steps"],
        )

    def _steps(self, steps: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.profile:
            parts = {"class_path": "luve_lightning.callbacks.StepParts", "init_args": {"after": steps}}
            found, steps = {"callbacks.step_parts": parts}, steps + PROFILED
        found |= {"trainer.val_check_interval": steps, "trainer.limit_val_batches": 1 if self.validate else 0}
        # One epoch: where a few clips make epochs of two steps, starting the loader's processes would count.
        found |= {} if self.mini else {"data.init_args.passes": steps}
        return {"trainer.max_steps": steps, **found}

    def _trainer(self, key: str) -> dict[str, Any]:
        if self.gpu:
            return {f"{key}.accelerator": "gpu", f"{key}.devices": self.devices}
        cpu = {f"{key}.accelerator": "cpu", f"{key}.devices": self.devices}
        if not self.mini:
            cpu |= {f"{key}.strategy": "ddp" if self.devices > 1 else "auto", f"{key}.precision": "32-true"}
        return cpu

    def _selection(self) -> dict[str, Any]:
        key = "data.init_args.selection"
        found: dict[str, Any] = {f"{key}.scores": "{scores}"}
        if not self.mini and self.hpsv3 is None:
            found |= {f"{key}.scorer": "sharpness-exposure"}
        # Made clips are not for anyone to choose from, and the local scorer's scale is another.
        if self.data is None or self.hpsv3 is None:
            found |= {f"{key}.threshold": 0.0}
        return found

    def _adaptation(self) -> tuple[Path, ...]:
        return self.config(f"experts/{'mini-adaptation' if self.mini else f'adaptation-{self._kind}'}")

    def _expert(self, name: str) -> tuple[Path, ...]:
        if self.mini:
            return self.config("experts/mini-lfe", *([] if name == "lfe" else ["experts/mini-hfe"]))
        whole = name == "lfe" or self.windows or self.size == "4k"  # else it says only what differs
        return self.config(*([] if whole else [f"experts/lfe-{self._kind}"]), f"experts/{name}-{self._kind}")

    @property
    def _kind(self) -> str:
        return self.size + "-windows" * self.windows

    # What is trained, used

    def _used(self) -> list[RehearsalStage]:
        config = self.config(f"generate/{'mini' if self.mini else self._kind}")
        output, kept = self.path("videos"), self.path("videos", "latents")
        values: dict[str, Any] = {"backbone": "{backbone}", "vluer": "{vluer}", "refiner": "{base}", "prompt": PROMPT}
        values |= {"experts.lfe": "{lfe}", "experts.hfe": "{hfe}", "output": output, "latents": kept}
        values |= {"contact_sheet": True, "keep_stages": False, "device": "cuda" if self.gpu else "cpu"}
        if self.video_steps is not None:
            whole, skipped = self._at(config, "steps"), self._at(config, "skip_steps")
            values |= {"steps": self.video_steps, "skip_steps": ceil(skipped * self.video_steps / whole)}
        if not (self.mini or self.gpu):
            values |= {"dtype": "float32", "speed.compile": False, "speed.decode_half": False}
        spread = self.video_devices > 1
        values |= {"context_parallel": self.video_devices} if spread else {}
        generate = RehearsalStage(
            "generate",
            "generate",
            config,
            values,
            needs=("backbone", "vluer", "base", "lfe", "hfe"),
            gives={"videos": output},
            begun="" if spread else "videos/latents/*/*.safetensors",  # torchrun tells no signal's status
            least=2,  # motion and upsampled: the third stage is running
            unit="video",
            gpus=self.video_devices,
        )
        return [generate, *self._measured()]

    def _measured(self) -> list[RehearsalStage]:
        made, table = self.path("upsampled"), self.path("table.csv")
        values: dict[str, Any] = {"backbone": "{backbone}", "index": "{index}", "output": made}
        # Two clips: the first one's seconds hold what is loaded once.
        values |= {"vluers.vluer": "{vluer}", "splits": ["val", "test"], "limit": 1, "caption": self.caption}
        values["device"] = "cuda" if self.gpu else "cpu"
        if not (self.mini or self.gpu):
            values["dtype"] = "float32"
        config = self.config("upsample/mini" if self.mini else "upsample/wan2.1")
        upsample = RehearsalStage(
            "upsample",
            "upsample",
            config,
            values,
            needs=("backbone", "index", "vluer"),
            gives={"upsampled": made},
            begun="upsampled/*/*.json",
            record=f"stages/upsample/{MEASURED}",
            unit="clip",
        )
        methods = ("bilinear", "bicubic", "rgb_bicubic", "vluer", "vae")
        values = {f"videos.{name}": f"{{upsampled}}/{name}" for name in methods}
        values |= {"reference": "{upsampled}/reference", "output": table, "device": "cuda" if self.gpu else "cpu"}
        if self.mini:
            values |= {"metrics.fd_patch_vae.init_args.extractor.init_args.backbone": "{backbone}"}
        config = self.config("evaluate/mini" if self.mini else "evaluate/metrics")
        needs, gives = ("backbone", "upsampled"), {"table": table}
        evaluate = RehearsalStage("evaluate", "evaluate", config, values, needs=needs, gives=gives)
        page = self.path("report.html")
        values = {"output": page, "title": "A rehearsal", "videos.generated": "{videos}"}
        names = ("vluer-1", "vluer-2", "adaptation", "lfe", "hfe")
        values |= {f"curves.{name}": self.path("runs", name) for name in names}
        report = RehearsalStage("report", "report", values=values, without={"videos": {}}, gives={"report": page})
        return [upsample, evaluate, report]

    def _at(self, configs: tuple[Path, ...], key: str) -> int:
        """A whole number of a composed configuration."""
        node: Any = self.compose(configs, ())
        for part in key.split("."):
            node = node[part]
        return int(node)
