"""The cost of a replaced attention, beside PyTorch's own counter and what is counted by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from luve_lightning.analysis.cost import REFERENCE, CountedAttention, counting_attention
from luve_lightning.analysis.dry_run import DryRun, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.analysis.plan import plan_text
from luve_lightning.analysis.planner import Planner
from luve_lightning.cascade.options import CascadeOptions
from luve_lightning.functional.frequency import Grid
from luve_lightning.models.attention import Attention, Where
from luve_lightning.models.attention.dense import Dense
from luve_lightning.models.attention.tiles import Tiles
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.attending import FrameAttention, LearnedFrameAttention

TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 16, "ffn_dim": 96, "num_layers": 2}
GRID = (3, 8, 12)  # latents
TOKENS = (3, 4, 6)


@dataclass(frozen=True)
class KernelOfItsOwn(FrameAttention):
    """FrameAttention by a kernel that PyTorch knows nothing of."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        assert query.is_meta
        return torch.empty_like(query)


@dataclass(frozen=True)
class DenseAtFirst(FrameAttention):
    """FrameAttention below a noise level, dense attention from it up."""

    above: float = 0.9

    @property
    def needs_sigma(self) -> bool:
        return True

    def pairs(self, grid: Grid, layer: int, sigma: float) -> int:
        return Dense().pairs(grid, layer, sigma) if sigma >= self.above else super().pairs(grid, layer, sigma)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, where: Where, branch: nn.Module | None = None
    ) -> Tensor:
        assert where.sigmas is not None
        dense = where.sigmas[0] >= self.above
        return Dense()(query, key, value, where) if dense else super().__call__(query, key, value, where)


def parts(attention: Attention | None, device: str = "meta", **changes: object) -> Parts:
    record = {} if attention is None else {"luve_attention": attention.record()}
    configs = PartConfigs(
        transformer=TRANSFORMER,
        vae={"base_dim": 4, "num_res_blocks": 1},
        text_encoder={"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        vluer={"channels": 16, "pairs": 1, "hidden": 32, "query_channels": 8},
        refiner=TRANSFORMER | record,
        text_length=12,
        **changes,  # type: ignore[arg-type]
    )
    return Parts(configs, torch.float32, device)


def forward(made: Parts, run: DryRun | None = None) -> None:
    denoiser, device = denoiser_of(made.refiner), made.device
    latents = torch.randn(2, 16, *GRID, device=device)
    text = torch.randn(2, 12, 16, device=device)
    denoiser.velocity(latents, torch.full((2,), 800.0, device=device), text, sigmas=(0.8, 0.8))


def counted(attention: Attention | None) -> DryRun:
    made = parts(attention)
    denoiser = denoiser_of(made.refiner)
    with dry_run() as run, counting_attention(denoiser, run):
        forward(made)
    assert denoiser.attention == attention
    return run


def self_attention(attention: Attention, sigma: float = 0.8) -> int:
    """Floating-point operations of self-attention for a batch of 2, by hand."""
    return sum(2 * 4 * 2 * 24 * attention.pairs(TOKENS, layer, sigma) for layer in range(2))


WINDOWS = Windows(cuts=((2, 3, 4), (1, 2, 1)), linear=True)  # of unequal sizes, another cut in each layer


@pytest.mark.parametrize(
    "attention",
    [
        Dense(),
        FrameAttention(),
        LearnedFrameAttention(),
        DenseAtFirst(),
        WINDOWS,
        Windows(cuts=((3, 2, 2),), ways="remote", dense_layers=(1,)),
        Windows(cuts=((3, 2, 2),), dense_above=0.7),
    ],
)
def test_flops_are_those_that_pytorch_counts_of_the_real_computation(attention: Attention) -> None:
    real = parts(attention, "cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward(real)
    run = counted(attention)
    assert run.flops == counter.get_total_flops()
    assert {operation.kind for operation in run.operations} >= {"attention", "matmul"}
    assert "block-sparse attention" not in {operation.kind for operation in run.operations}


def test_pairs_are_the_products_that_pytorch_computes() -> None:
    dense = Dense()
    for sparse in (FrameAttention(), Windows(cuts=((2, 3, 4), (1, 2, 1)))):
        assert counted(dense).flops - counted(sparse).flops == self_attention(dense) - self_attention(sparse) > 0
    assert counted(dense).flops == counted(None).flops


def test_tiles_of_many_tokens_count_by_their_pairs_and_make_no_mask() -> None:
    grid, heads, width = (5, 32, 32), 2, 16
    x = torch.empty(1, 5 * 32 * 32, heads, width, device="meta")
    attention = Tiles(tile=(2, 8, 8), reach=(1, 3, 3))
    peaks = []
    for _ in range(2):  # the second finds the tables of the first
        with dry_run() as run:
            CountedAttention(attention, run)(x, x, x, Where(grid, 0))
        peaks.append(run.peak)
    assert run.flops == 4 * heads * width * attention.pairs(grid, 0, 0.5)
    [kernel] = [operation for operation in run.operations if operation.flops]
    assert (kernel.kind, kernel.bytes) == ("block-sparse attention", 4 * x.nbytes)
    assert 3 * x.nbytes < peaks[0] < 10 * x.nbytes < (5 * 32 * 32) ** 2
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a_kernel_that_pytorch_does_not_know_counts_by_its_pairs() -> None:
    known, own = counted(FrameAttention()), counted(KernelOfItsOwn())
    assert own.flops == known.flops
    [kernel] = [operation for operation in own.operations if operation.kind == "block-sparse attention"]
    assert own.operations[kernel] == 2  # one a block
    assert 2 * kernel.flops == self_attention(KernelOfItsOwn())
    assert kernel.bytes == 4 * 2 * 72 * 2 * 24 * 4  # queries, keys, values and the output
    assert own.peak <= known.peak


def test_steps_count_by_what_the_noise_level_makes_of_them() -> None:
    options = CascadeOptions(128, 192, 9, 64, 96, steps=50, skip_steps=10)
    made = {name: Planner(parts(kind), options, speed=REFERENCE) for name, kind in {
        "dense": None, "frames": FrameAttention(), "both": DenseAtFirst(above=0.875)
    }.items()}  # fmt: skip
    dense, frames, both = (planner.denoising("refine", planner.grid) for planner in made.values())
    # 50 steps, shift 5: from timestep 875 up are the 11 steps of the low-frequency expert.
    assert both.attention == {"dense": 11, "DenseAtFirst": 29}
    assert (dense.attention, frames.attention) == ({"dense": 40}, {"FrameAttention": 40})
    assert both.flops == round(11 / 40 * dense.flops + 29 / 40 * frames.flops)
    assert both.peak == max(dense.peak, frames.peak)
    assert both.forwards == dense.forwards == 80
    assert dense.pairs == 1
    assert both.pairs == pytest.approx((11 + 29 / 3) / 40)  # three latent frames
    assert both.seconds == pytest.approx(11 / 40 * dense.seconds + 29 / 40 * frames.seconds, rel=0.01)
    assert made["both"].denoising("motion", (3, 8, 12)).attention == {"dense": 50}
    text = plan_text(made["both"].stages(), REFERENCE, made["both"].forward_passes())
    assert "attention: 11 steps dense, 29 steps DenseAtFirst, 51.7 % of the pairs" in text
    assert "DenseAtFirst, 33.3 % of the pairs: " in text


def test_single_passes_are_planned_with_dense_attention_and_with_its_own() -> None:
    planner = Planner(parts(LearnedFrameAttention()), CascadeOptions(128, 192, 9, 64, 96), speed=REFERENCE)
    attention = denoiser_of(planner.parts.refiner).attention
    dense, own = planner.forward_passes()
    assert denoiser_of(planner.parts.refiner).attention == attention
    assert (dense.attention, own.attention) == ({"dense": 1}, {"LearnedFrameAttention": 1})
    assert own.flops < dense.flops
    assert own.seconds is not None
    assert len(Planner(parts(None), planner.options).forward_passes()) == 1


def test_parameters_of_an_attention_are_weights() -> None:
    plain, learned = (weight_bytes(parts(kind).refiner) for kind in (FrameAttention(), LearnedFrameAttention()))
    assert learned - plain == 2 * -(-24 * 24 * 4 // 512) * 512


def test_an_unknown_rate_leaves_the_time_unknown() -> None:
    options = CascadeOptions(128, 192, 9, 64, 96, skip_steps=10)
    planner = Planner(parts(KernelOfItsOwn()), options, speed=REFERENCE)
    stages = planner.stages()
    assert {stage.stage for stage in stages if stage.seconds is None} == {"refine"}
    lines = plan_text(stages, REFERENCE, planner.forward_passes()).splitlines()
    assert next(line for line in lines if line.startswith("refine")).endswith("unknown")
    assert lines[-2].startswith("no time estimate on one h200")
    assert "luve bench --subject speed" in lines[-1]


def test_a_saved_attention_is_planned(tmp_path: Path, repository: Path) -> None:
    mini = repository / "data/mini/refiner"
    found = next(mini.rglob("config.json"))
    (tmp_path / "transformer").mkdir()
    config = json.loads(found.read_text()) | {"luve_attention": FrameAttention(frames=2).record()}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    configs = PartConfigs.from_pretrained(repository / "data/mini/wan", refiner=tmp_path / "transformer")
    made = Parts(configs, torch.float32)
    assert denoiser_of(made.refiner).attention == FrameAttention(frames=2)
    assert denoiser_of(made.transformer).attention is None
