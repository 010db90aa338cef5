"""Plans beside what was measured, what is counted by hand, and the code that is planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.analysis.cost import REFERENCE, GpuSpeed, gpu_speed
from luve_lightning.analysis.dry_run import CUBLAS_WORKSPACE, Operation, dry_run, weight_bytes
from luve_lightning.analysis.model_parts import PartConfigs, Parts, decode, wan_1_3b
from luve_lightning.analysis.plan import duration, plan_dict, plan_text, shared_stages
from luve_lightning.analysis.planner import Planner
from luve_lightning.cascade.options import CascadeOptions, Guidance
from luve_lightning.cascade.speed import SpeedOptions
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.models.experts import ExpertConfig, add_expert

MIB = 2**20
HIGH = (9, 128, 192)


def cascade(**changes: Any) -> CascadeOptions:
    return CascadeOptions(128, 192, 9, 64, 96, **{"skip_steps": 10} | changes)


@pytest.fixture(scope="module")
def wan() -> Parts:
    return Parts(wan_1_3b(), torch.bfloat16, vae_dtype=torch.bfloat16)


def small(**changes: object) -> Parts:
    configs = PartConfigs(
        transformer={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "text_dim": 16,
            "ffn_dim": 96,
            "num_layers": 2,
        },
        vae={"base_dim": 4, "num_res_blocks": 1},
        text_encoder={"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        vluer={"channels": 16, "pairs": 1, "hidden": 32, "query_channels": 8},
        text_length=12,
        **changes,  # type: ignore[arg-type]
    )
    return Parts(configs, torch.float32)


def test_wan_has_its_size(wan: Parts) -> None:
    assert sum(p.numel() for p in wan.transformer.parameters()) == 1_418_996_800
    assert sum(p.numel() for p in wan.codec.vae.parameters()) == 126_892_531
    assert sum(p.numel() for p in wan.vluer.parameters()) == 17_737_360
    assert weight_bytes(wan.text_encoder) == pytest.approx(2 * 5_680_910_336, rel=1e-4)


@pytest.mark.parametrize(("grid", "measured"), [((13, 184, 320), 8973.0)])
def test_a_forward_of_wan_takes_what_was_measured_on_a_gpu(
    wan: Parts, grid: tuple[int, int, int], measured: float
) -> None:
    """`luve bench --subject experts` on one H200, without experts."""
    latents = torch.empty(1, 16, *grid, device="meta", dtype=torch.bfloat16)
    text = torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    time = torch.empty(1, device="meta")
    with dry_run() as run:
        wan.transformer(latents, time, text)
    assert run.peak / MIB == pytest.approx(measured, rel=0.01)
    tokens = grid[0] * grid[1] * grid[2] // 4
    assert run.peak / tokens == pytest.approx(2 * (4 * 1536 + 2 * 8960) + 2 * 4 * 128, rel=0.002)
    d, f, blocks, words = 1536, 8960, 30, 512
    linear = 2 * tokens * (6 * d * d + 2 * d * f) + 2 * words * 2 * d * d
    attention = 4 * tokens * tokens * d + 4 * tokens * words * d
    outside = run.flops - blocks * (linear + attention)
    assert 0 < outside < 1e-3 * run.flops
    assert REFERENCE.seconds(run.operations) == pytest.approx(12.6, rel=0.06)


@pytest.mark.parametrize(("grid", "measured"), [((13, 184, 320), 790.0), ((13, 272, 480), 975.0)])
def test_the_vluer_takes_what_was_measured_on_a_gpu(wan: Parts, grid: tuple[int, int, int], measured: float) -> None:
    """`luve bench --subject vluer` on one H200: weights, input and cuBLAS's workspace included."""
    latents = torch.empty(1, 16, 13, 90, 160, device="meta", dtype=torch.bfloat16)
    with dry_run() as run:
        wan.vluer(latents, grid)
    peak = run.peak + weight_bytes(wan.vluer) + latents.nbytes + CUBLAS_WORKSPACE
    assert peak / MIB == pytest.approx(measured, rel=0.02)


def test_the_cascade_of_the_paper() -> None:
    parts = small()
    stages = Planner(parts, cascade(steps=50, skip_steps=10)).stages()
    assert [s.stage for s in stages] == ["text", "motion", "upsample", "refine", "decode"]
    text, motion, upsample, refine, decoded = stages
    assert motion.latents == (3, 8, 12)
    assert refine.latents == upsample.latents == decoded.latents == (3, 16, 24)
    assert motion.tokens == 3 * 4 * 6
    assert refine.tokens == 4 * motion.tokens
    assert (motion.steps, motion.forwards, refine.steps, refine.forwards) == (50, 100, 40, 80)
    assert text.forwards == 2
    assert refine.experts == {"none": 40}
    for stage in stages:
        assert stage.peak == stage.weights + stage.activations + stage.workspace
        assert stage.flops == pytest.approx(stage.flops_per_forward * stage.forwards, rel=1e-3)
        assert stage.seconds is None
    every = sum(weight_bytes(parts.module(name)) for name in parts.names())
    assert {stage.weights for stage in stages} == {every}


@pytest.mark.slow
def test_flops_of_a_stage_are_those_of_its_forwards() -> None:
    parts = small()
    [_, motion, *_] = Planner(parts, cascade(steps=8, skip_steps=2)).stages()
    with dry_run() as run:
        parts.transformer(
            torch.empty(1, 16, 3, 8, 12, device="meta"),
            torch.empty(1, device="meta"),
            torch.empty(1, 12, 16, device="meta"),
        )
    assert motion.flops == 16 * run.flops


@pytest.mark.slow
def test_guidance_in_an_interval_and_batched() -> None:
    parts = small()

    def motion(guidance: Guidance):  # type: ignore[no-untyped-def]
        return Planner(parts, cascade(guidance=guidance)).denoising("motion", (3, 8, 12))

    both, none = motion(Guidance()), motion(Guidance(1.0))
    assert none.forwards == 50
    assert none.flops * 2 == both.flops
    some = motion(Guidance(5.0, 0.2, 0.9))  # shift 5: sigma > 0.9 in the first 19 steps, < 0.2 in the last 3
    assert 50 < some.forwards < 100
    assert some.flops == both.flops * some.forwards // 100
    batched = motion(Guidance(batched=True))
    assert batched.forwards == 50
    assert batched.flops == both.flops
    assert batched.activations > 1.4 * none.activations


def test_experts_take_the_published_steps() -> None:
    parts = small()
    for name, place, band in (("lfe", "attention", (0.875, 1.0)), ("hfe", "feed_forward", (0.0, 0.875))):
        chosen = FrequencyFilter("low" if name == "lfe" else "high", 0.25)
        add_expert(parts.transformer, name, ExpertConfig(place, 8, 8, chosen, SigmaBand(*band)))  # type: ignore[arg-type]
    planner = Planner(parts, cascade())
    refine = planner.denoising("refine", planner.grid)
    assert refine.experts == {"lfe": 11, "hfe": 29}
    alone = planner.one_step("refine", planner.grid)
    assert planner.one_step("refine", planner.grid, "lfe").flops > alone.flops
    assert refine.flops > 40 * alone.flops


def test_first_uses_are_one_graph_for_each_expert_and_batch() -> None:
    parts = small()
    for name, band in (("lfe", (0.875, 1.0)), ("hfe", (0.0, 0.875))):
        low = FrequencyFilter("low", 0.25)
        add_expert(parts.transformer, name, ExpertConfig("attention", 8, 8, low, SigmaBand(*band)))
    speed = replace(REFERENCE, first_use={"compiler": 100.0, "forward": 10.0, "kernels": 1000.0})
    compiled = SpeedOptions(compile=True)

    def first_uses(options: CascadeOptions, running: SpeedOptions, speed: GpuSpeed | None = speed) -> list[Any]:
        return [stage.first_use_seconds for stage in Planner(parts, options, running, speed).stages()]

    assert first_uses(cascade(), compiled) == [0, 110, 0, 20, 0]  # the compiler starts once; two experts refine
    assert first_uses(cascade(), SpeedOptions()) == [0, 0, 0, 0, 0]
    assert first_uses(cascade(), compiled, REFERENCE) == [0, None, 0, None, 0]  # never measured
    some = cascade(guidance=Guidance(5.0, 0.2, 0.9, batched=True))  # steps of one sample and of two
    assert first_uses(some, compiled) == [0, 120, 0, 40, 0]
    # Kernels are built while denoising runs: what that does not cover is waited for.
    planner = Planner(parts, cascade(), SpeedOptions(), speed)
    planned = planner.stages()
    decoding = replace(planned[-1], first_use_seconds=1000.0)
    waits = planner._after(planned[:-1], decoding).first_use_seconds
    assert waits == pytest.approx(1000 - sum(stage.seconds or 0 for stage in planned[:-1]))
    text = plan_text([*planned[:1], decoding], speed)
    assert "first use s" in text.splitlines()[0]
    assert "16.7 min of it for first uses" in text
    unknown = plan_text([replace(decoding, first_use_seconds=None)], speed)
    assert "without loading and first uses" in unknown


def test_offload_keeps_what_runs() -> None:
    parts = small()
    stages = Planner(parts, cascade(), SpeedOptions(offload=True)).stages()
    weights = {stage.stage: stage.weights for stage in stages}
    assert weights["text"] == weight_bytes(parts.text_encoder)
    assert weights["motion"] == weights["refine"] == weight_bytes(parts.transformer)
    assert weights["upsample"] == weight_bytes(parts.vluer)
    assert weights["decode"] == weight_bytes(parts.codec)


@pytest.mark.slow
def test_a_refiner_of_its_own() -> None:
    parts = small(refiner={"num_attention_heads": 4, "attention_head_dim": 24, "text_dim": 16, "ffn_dim": 96})
    stages = {s.stage: s for s in Planner(parts, cascade(), SpeedOptions(offload=True)).stages()}
    assert stages["refine"].weights == weight_bytes(parts.refiner) > stages["motion"].weights


@pytest.mark.slow
def test_other_ways_to_the_video() -> None:
    parts = small()
    direct = Planner(parts, cascade(cascade=False)).stages()
    assert [s.stage for s in direct] == ["text", "direct", "decode"]
    assert direct[1].latents == (3, 16, 24)
    assert direct[1].steps == 50
    skipped = Planner(parts, cascade(steps=4, skip_steps=4)).stages()
    assert "refine" not in [s.stage for s in skipped]
    latent, rgb = (Planner(parts, cascade(upsampling=method)).upsampling() for method in ("latent", "rgb"))
    assert rgb.flops > latent.flops == 0
    assert rgb.peak > latent.peak


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (7, 11), (9, 4)])
def test_tiled_decoding_is_planned_as_it_runs(size: tuple[int, int]) -> None:
    parts = small()
    codec = parts.codec  # made before the runs
    latents = torch.empty(1, 16, 4, *size, device="meta")
    with dry_run() as run:
        decode(parts, latents, (4, 3))
    with dry_run() as planned:
        codec.dry_decode_in_tiles(latents, (4, 3), planned.times)
    assert planned.operations == run.operations
    assert planned.peak == run.peak


@pytest.mark.slow
def test_tiles_need_less_memory_and_more_work() -> None:
    parts = small()
    whole, tiled = (Planner(parts, cascade(), SpeedOptions(decode_tile=tile)).decoding() for tile in (None, (6, 6)))
    assert tiled.peak < whole.peak
    assert tiled.flops > whole.flops


def test_impossible_sizes() -> None:
    parts = small()
    with pytest.raises(ValueError, match=r"12 frames: expected 4k \+ 1, nearest are 9 and 13"):
        Planner(parts, CascadeOptions(64, 64, 12, 64, 64, cascade=False))
    with pytest.raises(ValueError, match=r"latent height 9: .*nearest are 8 and 10"):
        Planner(parts, CascadeOptions(72, 64, 9, 72, 64, cascade=False))
    with pytest.raises(ValueError, match="skip_steps 60"):
        cascade(skip_steps=60)


def test_parts_are_read_from_configuration_files_alone(repository: Path, tmp_path: Path) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes(
            (repository / "data/mini/wan" / part / "config.json").read_bytes()
        )
    with pytest.raises(FileNotFoundError, match=r"no scheduler/scheduler_config.json there"):
        PartConfigs.from_pretrained(tmp_path)
    configs = PartConfigs.from_pretrained(tmp_path, repository / "data/mini/vluer", tmp_path, shift=3.0)
    assert configs.shift == 3.0
    assert configs.text_length == 512
    assert configs.refiner == configs.transformer
    shipped = json.loads((repository / "data/mini/vluer/config.json").read_text())
    assert configs.vluer["channels"] == shipped["channels"]
    parts = Parts(configs, torch.bfloat16)
    assert parts.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert parts.transformer.scale_shift_table.dtype == torch.float32  # diffusers keeps it
    assert parts.codec.dtype == torch.float32
    assert {p.device.type for name in parts.names() for p in parts.module(name).parameters()} == {"meta"}


def test_weights_of_parts_are_those_of_loaded_models(repository: Path) -> None:
    from tests.helpers.tiny_wan import load_transformer

    backbone = repository / "data/mini/wan"
    loaded = load_transformer(backbone, torch.bfloat16)
    planned = Parts(PartConfigs.from_pretrained(backbone), torch.bfloat16).transformer
    kinds = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters()}
    assert kinds == {name: (p.shape, p.dtype) for name, p in planned.named_parameters()}


def test_time_is_the_longest_of_arithmetic_traffic_and_launch() -> None:
    h200 = REFERENCE
    half = torch.bfloat16
    assert h200.seconds({Operation("attention", 580 * 10**12, 10, half): 2}) == pytest.approx(2)
    assert h200.seconds({Operation("rest", 0, 4 * 10**12, half): 1}) == pytest.approx(1)
    assert h200.seconds({Operation("rest", 0, 8, half): 100}) == pytest.approx(5e-4)
    slow = h200.seconds({Operation("matmul", 10**14, 10, torch.float32): 1})
    assert slow > 5 * h200.seconds({Operation("matmul", 10**14, 10, half): 1})


def test_speeds_by_name_and_by_number() -> None:
    assert gpu_speed("h200", None) is REFERENCE
    half = gpu_speed("h200", 290)
    assert half is not None
    assert (half.tflops["matmul"], half.bandwidth) == (REFERENCE.tflops["matmul"] / 2, REFERENCE.bandwidth)
    with pytest.raises(
        ValueError, match=r"^gpu: expected h200 or a file .*, got 'k80'; or leave gpu out and give gpu_tf"
    ):
        gpu_speed("k80", None)
    with pytest.raises(ValueError, match="gpu_tflops: expected more than 0"):
        gpu_speed(None, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU that is here")
def test_without_a_gpu_the_given_speed_decides() -> None:
    assert gpu_speed(None, None) is None
    given = gpu_speed(None, 290)
    assert given is not None
    assert (given.name, given.tflops["convolution"]) == ("290 TFLOP/s", REFERENCE.tflops["convolution"] / 2)
    assert given.bandwidth == REFERENCE.bandwidth / 2


def test_gpus_that_share_a_video_divide_what_the_blocks_compute_and_hold() -> None:
    parts = small()
    parts.configs.transformer["ffn_dim"] = 4096  # so that blocks hold the most
    planner = Planner(parts, cascade(steps=4, skip_steps=1), speed=REFERENCE)
    alone, both = shared_stages(planner, 1), shared_stages(planner, 2)
    assert alone == planner.stages()
    for one, half in zip(alone, both, strict=True):
        if one.stage not in ("motion", "refine"):
            assert half == one
            continue
        assert one.seconds is not None
        assert (half.seconds, half.flops) == (one.seconds / 2, one.flops // 2)
        inside = sum(size for path, size in one.terms.items() if ".blocks." in path)
        assert inside > 0
        assert one.peak - half.peak == one.activations - half.activations == inside - inside // 2
        assert sum(one.terms.values()) - sum(half.terms.values()) == pytest.approx(inside / 2, abs=len(one.terms))
    text = plan_text(both, REFERENCE, gpus=2).splitlines()[-1]
    assert "on 2 h200, without what they tell each other" in text
    with pytest.raises(ValueError, match="context_parallel: 3 GPUs cannot share the 2 attention heads of motion"):
        shared_stages(planner, 3)
    with pytest.raises(ValueError, match="context_parallel: expected at least 1, got 0"):
        shared_stages(planner, 0)


def test_text_and_dictionary() -> None:
    video = cascade(steps=4, skip_steps=1)
    speed = REFERENCE
    stages = Planner(small(), video, speed=speed).stages()
    found = plan_dict(video, stages, speed)
    assert found["peak"] == max(stage["peak"] for stage in found["stages"])
    # The third and later ones have other names in a video's record, by which they are set beside it.
    made = ["text", "motion", "upsampled", "refined", "decoded"]
    assert [stage["made_as"] for stage in found["stages"]] == made
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    lines = plan_text(stages, speed).splitlines()
    assert lines[0].split()[:3] == ["stage", "latents", "tokens"]
    assert lines[4].split()[:5] == ["refine", "3x16x24", "288", "3", "6"]
    assert lines[-1].startswith("estimated time")
    assert lines[-1].endswith("fits its 139 GiB")
    assert "no time estimate" in plan_text(stages, None)
    assert plan_text(stages, replace(speed, memory_gib=0.0)).splitlines()[-1].endswith("without loading")
    assert [duration(s) for s in (0.5, 600, 7200)] == ["0.5 s", "10.0 min", "2.0 h"]


@pytest.mark.slow
def test_decoding_in_half_precision_is_planned_by_the_form_that_runs(wan: Parts) -> None:
    options = CascadeOptions(1472, 2560, 49, 720, 1280, skip_steps=10)
    parts = Parts(wan.configs, torch.bfloat16)  # the VAE in float32
    plain, half = (
        Planner(parts, options, SpeedOptions(offload=True, decode_half=half)).decoding() for half in (False, True)
    )
    assert half.flops == pytest.approx(plain.flops, rel=0.05)
    assert half.peak < plain.peak / 2
    assert half.peak == pytest.approx(39 * 2**30, rel=0.05)  # 36.6 GiB on an H100 without the video's 2 GiB
