"""Training a small VLUer to do what a large one does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luve_lightning.functional.interpolation import Size3d
from luve_lightning.losses import Loss
from luve_lightning.models.vluer import BaseVLUer, load_vluer
from luve_lightning.tasks.narrowing import check_narrowing, narrow
from luve_lightning.tasks.vluer import VLUerTask


class VLUerDistillationTask(VLUerTask):
    """Trains a small VLUer on a large one's outputs and features, beside the data's own targets.

    loss = sum of `losses` against the clip (as in VLUerTask, phases and all)
         + sum of `teacher_losses` against the teacher's output
         + `feature_weight` times the mean over `features` of |P s - f|^2 / |f|^2,

    where f is the output of a module of the teacher, s that of a module of the student, and P a 1x1x1 convolution
    (FitNets, arXiv 1412.6550). The projections are trained and are part of checkpoints, but not of the model that is
    exported, which is a VLUer like any other. The teacher is frozen and enters neither.

    Before the first step the student takes its weights from the teacher (`start`), and the projections are fitted by
    least squares, both on `samples` training crops at each scale.

    Args:
        net: the student.
        backbone: see VLUerTask.
        losses: against the clip; see VLUerTask.
        teacher: folder of a saved VLUer, of any class.
        teacher_losses: losses in latent space by name, against the teacher's output; may be empty.
        feature_weight: weight of the features' term, >= 0; 0 needs no projections.
        features: module of the student to module of the teacher whose outputs B x C x T x h x w lie on the same grid.
        start: "teacher" narrows the teacher to the student's numbers, both VLUers; "net" keeps the student's weights,
            random ones or those of `init_from`.
        samples: training crops at each scale to narrow the teacher and fit the projections on, >= 1.
        pixel_from_step: see VLUerTask.
        pixel_crop: see VLUerTask.
        pixel_frames: see VLUerTask.
        pixel_clamp: see VLUerTask.
        init_from: see VLUerTask; only with `start: net`.
        codec_dtype: see VLUerTask.
        seed: see VLUerTask; also that of the samples.
        lr: see TrainingTask.
        min_lr: see TrainingTask.
        weight_decay: see TrainingTask.
        warmup_steps: see TrainingTask.
        betas: see TrainingTask.
    """

    def __init__(
        self,
        net: BaseVLUer,
        backbone: str,
        losses: dict[str, Loss],
        teacher: str,
        teacher_losses: dict[str, Loss],
        feature_weight: float = 0.0,
        features: dict[str, str] = {"encoder": "encoder"},  # noqa: B006  # only read
        start: Literal["teacher", "net"] = "teacher",
        samples: int = 16,
        pixel_from_step: int = -1,
        pixel_crop: tuple[int, int, int] = (6, 24, 24),
        pixel_frames: Literal["random", "first"] = "random",
        pixel_clamp: bool = False,
        init_from: str | None = None,
        codec_dtype: str = "float32",
        seed: int = 0,
        lr: float = 2e-4,
        min_lr: float = 1e-7,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        if start == "teacher" and init_from is not None:
            raise ValueError(f"init_from: {init_from}: the net starts from its teacher; give start: net to use it")
        if samples < 1 or not feature_weight >= 0:
            raise ValueError(f"expected samples >= 1 and feature_weight >= 0, got {samples} and {feature_weight}")
        if wrong := [name for name, loss in teacher_losses.items() if loss.space != "latent"]:
            raise ValueError(f"teacher_losses: expected losses in latent space, got another in {', '.join(wrong)}")
        super().__init__(
            net,
            backbone,
            losses,
            pixel_from_step,
            pixel_crop,
            pixel_frames,
            pixel_clamp,
            init_from,
            codec_dtype,
            seed,
            lr,
            min_lr,
            weight_decay,
            warmup_steps,
            betas,
        )
        if not (Path(teacher) / "config.json").is_file():
            raise FileNotFoundError(f"teacher: {teacher}: no config.json there; expected the folder of a saved VLUer")
        self.teacher: BaseVLUer = load_vluer(teacher).requires_grad_(False).eval()
        if self.teacher.config.latent_channels != net.config.latent_channels:
            raise ValueError(
                f"teacher: {teacher} takes {self.teacher.config.latent_channels} latent channels, "
                f"net takes {net.config.latent_channels}"
            )
        if start == "teacher":
            check_narrowing(self.teacher, net)
        self.teacher_losses = nn.ModuleDict(teacher_losses)
        self.teacher_folder, self.start, self.samples = teacher, start, samples
        self.feature_weight = feature_weight
        self.features = dict(features) if feature_weight else {}
        self.projections = nn.ModuleList(
            nn.Conv3d(student, taught, 1) for student, taught in _feature_channels(net, self.teacher, self.features)
        )

    def _schedule(self) -> dict[str, Any]:
        """What a resumed run says when it differs: also the teacher and the features' weight."""
        return super()._schedule() | {"teacher": self.teacher_folder, "feature_weight": self.feature_weight}

    def train(self, mode: bool = True) -> VLUerDistillationTask:
        """See nn.Module; the teacher never trains."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_fit_start(self) -> None:
        """Check the sizes for both networks, and start from the teacher unless a checkpoint is resumed."""
        super().on_fit_start()
        self.check_data(self.teacher, "teacher: ", ("train",))
        if self.trainer.ckpt_path is not None or not (self.projections or self.start == "teacher"):
            return
        weights: dict[str, Tensor] | None = None
        if self.trainer.is_global_zero:
            self.begin(self._samples())
            trained = self._trainable_keys()
            weights = {name: x.cpu() for name, x in self.state_dict().items() if name in trained}
        # What two machines compute is not the same to the bit.
        weights = self.trainer.strategy.broadcast(weights)
        assert weights is not None
        self.load_state_dict(weights, strict=False)

    def begin(self, samples: Iterable[tuple[Tensor, Size3d]]) -> None:
        """Take the student's weights from the teacher where `start` says so, and fit the projections.

        Args:
            samples: batches of low-resolution latents and the sizes to upsample them to.
        """
        found = [(latents.to(self.device), size) for latents, size in samples]
        if self.start == "teacher":
            narrow(self.teacher, self.net, found, self.seed)  # VLUers, as was checked
        if self.projections:
            with torch.no_grad():
                pairs = zip(*(self.features_of(latents, size) for latents, size in found), strict=True)
                for projection, batches in zip(self.projections, pairs, strict=True):
                    _fit(projection, batches)

    def _samples(self) -> Iterable[tuple[Tensor, Size3d]]:
        """Training crops at every scale, the same ones for one seed."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "low_crops"):
            raise ValueError("start: needs the training crops of LatentPairsDataModule, the data have none")
        found: Iterable[tuple[Tensor, Size3d]] = data.low_crops(self.samples, self.seed)
        return found

    def features_of(self, latents: Tensor, size: Size3d) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's features of latents, in the order of `features`, not projected."""
        with torch.no_grad(), recorded(self.teacher, self.features.values()) as taught:
            self.teacher(latents, size)
        with recorded(self.net, self.features) as learned:
            self.net(latents, size)
        return [(learned[own], taught[other]) for own, other in self.features.items()]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted sum of the active losses, the teacher's and the features' term."""
        low, size = batch["lr"], tuple(batch["hr"].shape[2:])
        with torch.no_grad(), recorded(self.teacher, self.features.values()) as taught:
            target = self.teacher(low, size)
        with recorded(self.net, self.features) as learned:
            prediction = self(low, size)
        terms = self.weighted_terms(prediction, batch)
        for name, loss in self.teacher_losses.items():
            value = loss(prediction, target)
            self.log(f"train/teacher_{name}", value.detach())
            terms.append(loss.weight * value)
        if self.features:
            pairs = zip(self.projections, self.features.items(), strict=True)
            errors = [feature_error(projection(learned[own]), taught[other]) for projection, (own, other) in pairs]
            mean = torch.stack(errors).mean()
            self.log("train/features", mean.detach())
            terms.append(self.feature_weight * mean)
        total = torch.stack(terms).sum()
        self.log("train/loss", total.detach(), prog_bar=True)
        return total


def feature_error(projected: Tensor, taught: Tensor) -> Tensor:
    """|P s - f|^2 / |f|^2 over a batch: 0 for the teacher's features, 1 for none."""
    taught = taught.float()
    return (projected.float() - taught).square().mean() / taught.square().mean().clamp(min=1e-12)


@contextmanager
def recorded(net: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What modules of a network gave when it ran in this context, by name."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output

    hooks = [net.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _feature_channels(net: nn.Module, teacher: nn.Module, features: Mapping[str, str]) -> list[tuple[int, int]]:
    """Channels of each pair of features, of the student and of the teacher.

    Raises:
        ValueError: for a module that one of them lacks, or whose output is not on the other's grid.
    """
    if not features:
        return []
    given, wanted = (6, 64, 96), (7, 128, 160)
    found = []
    for what, model, names in (("net", net, list(features)), ("teacher", teacher, list(features.values()))):
        if lacking := [name for name in names if name not in dict(model.named_modules())]:
            raise ValueError(f"features: the {what} has no module {lacking[0]!r}")
        empty: Any = copy.deepcopy(model).to("meta")
        with torch.no_grad(), recorded(empty, names) as outputs:
            empty(torch.empty(1, empty.config.latent_channels, *given, device="meta"), wanted)
        for name in names:
            shape = tuple(outputs[name].shape) if name in outputs else ()
            if len(shape) != 5 or shape[2:] not in (given, wanted):
                raise ValueError(
                    f"features: {name!r} of the {what}: expected a module that gives B x C x T x h x w on the grid of "
                    "the low or the high resolution, once"
                )
        found.append([tuple(outputs[name].shape) for name in names])
    for (own, other), student, taught in zip(features.items(), *found, strict=True):
        if student[2:] != taught[2:]:
            raise ValueError(f"features: {own!r} of the net and {other!r} of the teacher are of unlike resolutions")
    return [(student[1], taught[1]) for student, taught in zip(*found, strict=True)]


@torch.no_grad()
def _fit(projection: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The projection that takes the student's features nearest to the teacher's, by least squares."""
    products: Any = 0.0
    targets: Any = 0.0
    for student, taught in batches:
        x, y = (features.movedim(1, -1).flatten(0, -2).double() for features in (student, taught))
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        products, targets = products + x.T @ x, targets + x.T @ y
    ridge = 1e-6 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=products.device)
    found = torch.linalg.solve(products + ridge, targets).T
    projection.weight.copy_(found[:, :-1, None, None, None])
    projection.bias.copy_(found[:, -1])
