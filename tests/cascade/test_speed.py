"""What makes the pipeline faster: off by default, and the same video or nearly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from luve_lightning.cascade import Guidance, LuVePipeline, SpeedOptions
from luve_lightning.cascade.speed import (
    compile_blocks,
    compiler_being_loaded,
    disable_cache,
    enable_cache,
    enable_context_parallel,
    set_attention_backend,
)
from luve_lightning.cascade.stages import decode, upsample
from luve_lightning.models.attention.windows import Windows
from luve_lightning.models.backbones import denoiser_of
from tests.helpers.attending import FrameAttention, LearnedFrameAttention
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.tiny_luve import EXPERTS, PROMPT, noise, seeded, tiny_luve
from tests.helpers.tiny_wan import tiny_transformer

RUN: dict[str, Any] = {
    "height": 64, "width": 96, "num_frames": 5, "steps": 4, "skip_steps": 0, "output_type": "latent"
}  # fmt: skip


@pytest.fixture
def pipeline(tiny_backbone: Path) -> LuVePipeline:
    return tiny_luve(tiny_backbone, EXPERTS)


def video(pipeline: LuVePipeline, **changes: Any) -> Tensor:
    frames: Tensor = pipeline(PROMPT, **RUN | changes, generator=seeded()).frames
    return frames


@contextmanager
def computed_blocks(pipeline: LuVePipeline) -> Iterator[list[int]]:
    """How often each block really ran: its feed-forward's last layer did."""
    counts = [0] * len(pipeline.transformer.blocks)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    layers = [m for n, m in pipeline.transformer.named_modules() if n.endswith("net.2")]
    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(layers)]
    yield counts
    for handle in handles:
        handle.remove()


def test_decoding_in_half_precision_is_near(pipeline: LuVePipeline) -> None:
    latents = noise(1, 16, 2, 4, 6)
    exact = decode(pipeline, latents)
    pipeline.apply(SpeedOptions(decode_half=True))
    half = decode(pipeline, latents)
    assert half.dtype == exact.dtype
    assert 1e-5 < np.abs(half - exact).mean() < 0.02


@pytest.mark.slow
def test_the_compiler_is_loaded_where_it_is_needed() -> None:
    assert compiler_being_loaded(SpeedOptions()) is None
    thread = compiler_being_loaded(SpeedOptions(compile=True))
    assert thread is not None
    thread.join()
    assert "torch._inductor.compile_fx" in sys.modules


def test_options_put_everything_into_force(pipeline: LuVePipeline) -> None:
    pipeline.apply(SpeedOptions())
    assert not pipeline.transformer.is_cache_enabled
    assert pipeline.decode_tile is None
    assert not pipeline.decode_half
    options = SpeedOptions("_native_math", "first_block", 0.25, 3, True, False, (2, 3))
    pipeline.apply(options)
    assert pipeline.transformer._cache_config.threshold == 0.25
    assert pipeline.decode_tile == (2, 3)
    assert pipeline.transformer.blocks[0]._compiled_call_impl is not None
    assert pipeline.transformer.blocks[0].attn1.base_layer.processor._attention_backend == "_native_math"
    taylor = SpeedOptions(cache="taylorseer", cache_interval=7).cache_config(denoiser_of(pipeline.transformer))
    assert taylor.cache_interval == 7


def test_an_attention_backend_is_that_of_these_transformers_alone(tiny_backbone: Path, pipeline: LuVePipeline) -> None:
    want = video(pipeline)
    set_attention_backend(pipeline, "_native_math")
    assert _AttentionBackendRegistry._active_backend == "native"
    torch.testing.assert_close(video(pipeline), want, atol=1e-3, rtol=1e-3)
    assert torch.equal(video(tiny_luve(tiny_backbone, EXPERTS)), want)
    for name in ("fastest", "flash"):  # unknown, not installed
        with pytest.raises(ValueError, match=f"attention backend '{name}': ") as error:
            set_attention_backend(pipeline, name)
        assert "\n" not in str(error.value)


def test_a_backend_says_that_a_replaced_attention_ignores_it(pipeline: LuVePipeline) -> None:
    denoiser_of(pipeline.transformer).use_attention(FrameAttention())
    want = video(pipeline)
    with pytest.warns(
        UserWarning, match=r"'_native_math': of no effect on self-attention .* replaced by FrameAttention"
    ):
        pipeline.apply(SpeedOptions(attention_backend="_native_math"))
    torch.testing.assert_close(video(pipeline), want, atol=1e-3, rtol=1e-3)


def test_caches_and_a_replaced_attention(pipeline: LuVePipeline) -> None:
    """They skip and extrapolate as with the family's own; what would skip nothing changes nothing."""
    dense = video(pipeline)
    denoiser_of(pipeline.transformer).use_attention(FrameAttention())
    want = video(pipeline)
    assert not torch.allclose(want, dense, atol=1e-3)
    pipeline.apply(SpeedOptions(cache="first_block", cache_threshold=0.0))
    assert torch.equal(video(pipeline), want)
    disable_cache(pipeline)
    pipeline.apply(SpeedOptions(cache="taylorseer", cache_interval=4))
    with computed_blocks(pipeline) as counts:
        got = video(pipeline, experts="none", guidance=1.0, steps=12)
    assert counts == [2 * 5] * 2
    disable_cache(pipeline)
    assert not torch.equal(got, video(pipeline, experts="none", guidance=1.0, steps=12))
    assert torch.equal(video(pipeline), want)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(3.0), Guidance(3.0, batched=True)])
@pytest.mark.parametrize(("threshold", "computed"), [(0.0, 8), (1e9, 3)])
def test_first_block_cache(pipeline: LuVePipeline, guidance: Guidance, threshold: float, computed: int) -> None:
    """Of 4 + 4 steps one each is computed whole of the motion, the LFE's and the HFE's: never another's residual."""
    want = video(pipeline, guidance=guidance)
    pipeline.apply(SpeedOptions(cache="first_block", cache_threshold=threshold))
    passes = 2 if guidance.scale > 1 and not guidance.batched else 1
    with computed_blocks(pipeline) as counts:
        got = video(pipeline, guidance=guidance)
    assert counts == [8 * passes, computed * passes]
    assert torch.equal(got, want) == (threshold == 0)
    assert torch.equal(video(pipeline, guidance=guidance), got)  # nothing is left of the run before
    disable_cache(pipeline)
    assert torch.equal(video(pipeline, guidance=guidance), want)


def test_taylorseer_cache(pipeline: LuVePipeline) -> None:
    """Three steps of every expert are computed to learn from; then every fourth."""
    options: dict[str, Any] = {"experts": "none", "guidance": 1.0, "steps": 12}
    want = video(pipeline, **options)
    pipeline.apply(SpeedOptions(cache="taylorseer", cache_interval=4))
    with computed_blocks(pipeline) as counts:
        got = video(pipeline, **options)
    computed = [step for step in range(12) if step < 3 or (step - 4) % 4 == 0]
    assert counts == [2 * len(computed)] * 2
    assert not torch.equal(got, want)
    assert (got - want).abs().mean() < 0.2 * want.std()
    with computed_blocks(pipeline) as counts:
        video(pipeline, experts="all")  # 4 steps, no expert has more than 2 of them
    assert counts == [2 * 7] * 2  # the motion extrapolates its last


def test_a_cache_that_does_nothing_is_refused(pipeline: LuVePipeline) -> None:
    with pytest.raises(ValueError, match="TaylorSeerCacheConfig as given names no module of this transformer"):
        enable_cache(pipeline, TaylorSeerCacheConfig())  # diffusers' default
    want = video(pipeline)
    enable_cache(pipeline, MagCacheConfig(threshold=0.0, mag_ratios=[1.01] * 4, num_inference_steps=4))
    torch.testing.assert_close(video(pipeline), want)


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True], ids=["own attention", "windows"])
def test_compiled_blocks(pipeline: LuVePipeline, replaced: bool) -> None:
    options: dict[str, Any] = {"steps": 2, "skip_steps": 0, "switch": 0.9}
    if replaced:
        denoiser_of(pipeline.refinement_transformer).use_attention(Windows(((1, 2, 2), (2, 1, 2))))
    want = pipeline(PROMPT, **RUN | options, generator=seeded())
    torch._dynamo.reset()
    compile_blocks(pipeline, backend="eager")
    got = pipeline(PROMPT, **RUN | options, generator=seeded())
    assert [use.expert for use in got.experts_used] == [None, None, "lfe", "hfe"]
    torch.testing.assert_close(got.frames, want.frames, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


@pytest.mark.slow
def test_tiled_decoding(pipeline: LuVePipeline) -> None:
    latents = noise(2, 16, 2, 6, 8)
    whole = {kind: decode(pipeline, latents, kind) for kind in ("pt", "np")}
    rgb = upsample(pipeline, latents, (64, 64), method="rgb")
    pipeline.apply(SpeedOptions(decode_tile=(3, 4)))
    for kind, want in whole.items():
        got = decode(pipeline, latents, kind)
        assert type(got) is type(want)
        assert abs(got - want).max() < 1e-4
    torch.testing.assert_close(upsample(pipeline, latents, (64, 64), method="rgb"), rgb, atol=1e-3, rtol=1e-3)
    pipeline.decode_tile = None
    assert torch.equal(decode(pipeline, latents, "pt"), whole["pt"])
    for tile in ((0, 4), (4,)):
        with pytest.raises(ValueError, match="expected a height and a width in latents"):
            SpeedOptions(decode_tile=tile)


@pytest.mark.slow
def test_offloaded_models(pipeline: LuVePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the CPU from the CPU: every model that runs was brought to its device first."""
    want = {kind: video(pipeline, upsampling=kind, output_type="np") for kind in ("vluer", "rgb")}
    pipeline.enable_model_cpu_offload(device="cpu")
    brought: list[str] = []
    names = {id(part): name for name, part in pipeline.components.items()}
    from accelerate.hooks import CpuOffload

    pre_forward = CpuOffload.pre_forward

    def noted(hook: CpuOffload, module: Any, *args: Any, **kwargs: Any) -> Any:
        brought.append(names[id(module)])
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted)
    for kind, frames in want.items():
        brought.clear()
        # Offloading lays weights out anew, by which some processors' kernels round otherwise, in each of many layers:
        # a small VAE alone was seen to differ by 2e-5 in [-1, 1]. A grey level is 4e-3.
        np.testing.assert_allclose(video(pipeline, upsampling=kind, output_type="np"), frames, rtol=0, atol=1e-4)
        order = list(dict.fromkeys(brought))
        assert order == ["text_encoder", "transformer", "vluer" if kind == "vluer" else "vae", "vae"][: len(order)]
        assert "vae" in order
        assert ("vluer" in order) == (kind == "vluer")


def test_what_does_not_work_is_refused(pipeline: LuVePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for options, message in (
        ({"offload": True}, "offload: models are kept off a GPU, and there is none here"),
        ({"cache": "fastest"}, "cache: expected one of first_block, taylorseer or null, got 'fastest'"),
        ({"cache": "first_block", "cache_threshold": -1}, "cache_threshold -1"),
        ({"cache": "taylorseer", "cache_interval": 0}, "cache_interval 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.apply(SpeedOptions(**options))  # type: ignore[arg-type]


# Context parallelism


def replace_attention(transformer: Any, attention: Windows | None) -> None:
    denoiser = denoiser_of(transformer)
    denoiser.use_attention(attention)
    for branch in denoiser.branches.values():
        branch.load_state_dict({name: noise(*x.shape, seed=7) for name, x in branch.state_dict().items()})


def spread(run: Run) -> None:
    """What one of two processes does that make one video together; it leaves latents.pt in a folder of its own."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    # diffusers numbers accelerators by rank, of which a CPU-only machine has none.
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", rank=rank, world_size=run.processes)
    pipeline = tiny_luve(run.task["backbone"], EXPERTS, refiner=True)
    replace_attention(pipeline.refiner, run.task["attention"])
    enable_context_parallel(pipeline, run.processes)
    with pytest.raises(ValueError, match="needs a generator of the same seed on every process"):
        pipeline(PROMPT, **RUN)
    with pytest.raises(ValueError, match=r"^3 tokens do not divide among 2 devices"):
        pipeline(PROMPT, **RUN | {"height": 16, "width": 48, "num_frames": 1}, generator=seeded())
    output = pipeline(PROMPT, **RUN, generator=seeded(), keep_stages=True)
    torch.save(output.stages, run.folder / f"stages-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, Windows(((2, 2, 3), (1, 2, 2)), dense_above=0.9, linear=True)], ids=repr)
def test_two_processes_make_one_video(tiny_backbone: Path, tmp_path: Path, attention: Windows | None) -> None:
    """With both experts, whose filters need the tokens of both processes, and a refiner's replaced attention."""
    run = Run(tmp_path, processes=2, task={"backbone": tiny_backbone, "attention": attention})
    statuses = run_processes(run, spread)
    assert statuses == [0, 0], "".join(file.read_text() for file in tmp_path.glob("output-*.txt"))
    alone = tiny_luve(tiny_backbone, EXPERTS, refiner=True)
    replace_attention(alone.refiner, attention)
    want = alone(PROMPT, **RUN, generator=seeded(), keep_stages=True).stages
    for rank in (0, 1):
        got = torch.load(tmp_path / f"stages-{rank}.pt")
        for name, latents in want.items():
            torch.testing.assert_close(got[name], latents, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("degree", [5, 8, 24])
def test_a_degree_that_does_not_divide_the_heads_is_refused(pipeline: LuVePipeline, degree: int) -> None:
    pipeline.transformer = tiny_transformer(num_attention_heads=12, in_channels=16, num_layers=1)
    message = f"context_parallel {degree}: the transformer's 12 attention heads .* expected one of 1, 2, 3, 4, 6, 12$"
    with pytest.raises(ValueError, match=message):
        enable_context_parallel(pipeline, degree)
    with pytest.raises(ValueError, match="context_parallel: expected at least 2, got 1"):
        enable_context_parallel(pipeline, 1)
    with pytest.raises(ValueError, match="1 process here; start it with torchrun --nproc_per_node 4"):
        enable_context_parallel(pipeline, 4)
    denoiser_of(pipeline.transformer).use_attention(LearnedFrameAttention())
    with pytest.raises(ValueError, match=r"spreads heads, and LearnedFrameAttention.* has parameters for all of them"):
        enable_context_parallel(pipeline, 4)


def test_first_block_cache_and_context_parallelism_are_refused_together(pipeline: LuVePipeline) -> None:
    pipeline.apply(SpeedOptions(cache="first_block"))
    with pytest.raises(ValueError, match="first_block decides on each process's own tokens"):
        enable_context_parallel(pipeline, 2)
    disable_cache(pipeline)
    pipeline.context_parallel_degree = 2
    with pytest.raises(ValueError, match="first_block decides on each process's own tokens"):
        pipeline.apply(SpeedOptions(cache="first_block"))
