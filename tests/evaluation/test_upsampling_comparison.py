"""Scores and tables against plain loops over the clips."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.cascade.upsampling import LatentUpsampler, LooseModels, baselines
from luve_lightning.evaluation.tables import table_csv
from luve_lightning.evaluation.upsampling_comparison import (
    COLUMNS,
    ClipScore,
    Fidelity,
    UpsamplingComparison,
    closed_gap,
    comparison_rows,
    gather_scores,
    method_names,
)
from luve_lightning.functional.fidelity import frame_difference_error, psnr, ssim
from luve_lightning.functional.interpolation import interpolate_latents
from luve_lightning.machine import Cost
from luve_lightning.models.backbones import LatentSpace, load_backbone
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run
from tests.helpers.upsampling import SCALES, TinyPairs, compare, tiny_vluer

CLIPS = 2


@pytest.fixture(scope="module")
def codec(tiny_backbone: Path) -> LatentSpace:
    return load_backbone(tiny_backbone).latent_space()


@pytest.fixture(scope="module")
def pairs(tiny_backbone: Path) -> TinyPairs:
    return TinyPairs(tiny_backbone, CLIPS)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return torch.utils.data.default_collate(items)  # type: ignore[no-any-return]


def baseline_methods(codec: LatentSpace) -> dict[str, LatentUpsampler]:
    return {name: method.of(LooseModels(codec)) for name, method in baselines().items()}


def test_names_and_their_order() -> None:
    assert method_names() == ["vluer", *baselines(), "vae"]
    assert method_names(["vluer_shipped"])[:3] == ["vluer", "vluer_shipped", next(iter(baselines()))]


@pytest.mark.parametrize("extra", [["vae"], ["vluer"], ["a", "bilinear", "nearest"]])
def test_a_taken_name_is_refused(extra: list[str]) -> None:
    with pytest.raises(ValueError, match="has a method of that name already"):
        method_names(extra)


def test_the_header_is_the_one_asked_for() -> None:
    assert ",".join(COLUMNS) == "scale,method,latent_l1,psnr_rgb,ssim,frame_diff,ms,peak_mib"


@pytest.mark.slow
def test_scores_are_those_of_a_plain_loop(codec: LatentSpace, pairs: TinyPairs) -> None:
    net = tiny_vluer().eval()
    comparison = UpsamplingComparison(codec, {"vluer": net} | baseline_methods(codec))
    scores = [score for item in pairs.items for score in comparison.score_batch(collate([item]))]
    rows = comparison_rows(scores, method_names())
    assert [(r["scale"], r["method"]) for r in rows] == [(s, m) for s in SCALES for m in method_names()]

    for row in rows:
        values = []
        for item in pairs.items:
            if item["scale"] != row["scale"]:
                continue
            low, high, video = item["lr"][None], item["hr"][None], item["video"][None]
            size = tuple(high.shape[2:])
            with torch.no_grad():
                latents = {
                    "vluer": lambda: net(low, size),  # noqa: B023
                    "vae": lambda: high,  # noqa: B023
                    "nearest": lambda: interpolate_latents(low, size, "nearest"),  # noqa: B023
                    "bilinear": lambda: interpolate_latents(low, size, "bilinear"),  # noqa: B023
                    "bicubic": lambda: interpolate_latents(low, size, "bicubic"),  # noqa: B023
                }.get(row["method"], lambda: baseline_methods(codec)[row["method"]](low, size))()  # noqa: B023
                decoded = codec.vae.decode(codec.denormalize(latents)).sample
            measured = [f(decoded, video).item() for f in (psnr, ssim, frame_difference_error)]
            values.append([(latents - high).abs().mean().item(), *measured])
        assert len(values) == CLIPS
        want = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        assert [row[c] for c in COLUMNS[2:6]] == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_the_ceiling_costs_nothing_and_is_decoded_once_for_a_clip(codec: LatentSpace, pairs: TinyPairs) -> None:
    decoded: list[int] = []
    hook = codec.vae.decoder.conv_out.register_forward_hook(lambda m, args, out: decoded.append(len(out)))
    comparison = UpsamplingComparison(codec, {"bilinear": baseline_methods(codec)["bilinear"]})
    scores = [score for item in pairs.items for score in comparison.score_batch(collate([item]))]
    hook.remove()
    assert sum(decoded) == len(pairs.items) + CLIPS  # bilinear of each item, the ceiling of each clip
    ceilings = [s for s in scores if s.method == "vae"]
    assert len(ceilings) == len(pairs.items)
    assert all(s.latent_l1 == 0 and s.cost == Cost(0.0, 0.0) for s in ceilings)
    for clip in {s.clip for s in ceilings}:
        assert len({s.fidelity for s in ceilings if s.clip == clip}) == 1


@pytest.mark.parametrize("timed", [1, 2])
def test_time_is_taken_on_a_few_clips_and_scores_on_all(codec: LatentSpace, tiny_backbone: Path, timed: int) -> None:
    """Of each size, a method runs once a clip, and before the first to warm up and for its memory."""
    net, runs = tiny_vluer().eval(), list[tuple[int, ...]]()
    net.register_forward_hook(lambda module, args, out: runs.append(tuple(args[0].shape[3:])))
    items = TinyPairs(tiny_backbone, clips=3).items
    comparison = UpsamplingComparison(codec, {"vluer": net}, timed_clips=timed)
    scores = [score for item in items for score in comparison.score_batch(collate([item]))]
    assert Counter(runs) == {(4, 4): 3 + 2, (3, 3): 3 + 2}
    for scale in SCALES:
        of_scale = [s for s in scores if (s.scale, s.method) == (scale, "vluer")]
        assert [s.cost is not None for s in of_scale] == [i < timed for i in range(3)]
        [row] = comparison_rows(of_scale, ["vluer"])
        assert row["psnr_rgb"] == pytest.approx(sum(s.fidelity.psnr_rgb for s in of_scale) / 3)
        assert row["ms"] > 0
    everything = UpsamplingComparison(codec, {"vluer": net}, timed_clips=3)
    again = [score for item in items for score in everything.score_batch(collate([item]))]
    assert [s.fidelity for s in again] == [s.fidelity for s in scores]
    assert all(s.cost is not None for s in again)
    with pytest.raises(ValueError, match="timed_clips: expected at least 1, got 0"):
        UpsamplingComparison(codec, {"vluer": net}, timed_clips=0)


def test_two_windows_of_one_clip_are_two_clips(codec: LatentSpace, pairs: TinyPairs) -> None:
    comparison = UpsamplingComparison(codec, {"bilinear": baseline_methods(codec)["bilinear"]})
    items = [item | {"clip_id": "same"} for item in pairs.items[:CLIPS]]
    scores = gather_scores(comparison.score_batch(collate(items)))
    assert len({s.clip for s in scores}) == CLIPS
    assert len({s.fidelity for s in scores if s.method == "vae"}) == CLIPS


@pytest.mark.slow
def test_a_batch_scores_as_its_clips_do_alone(codec: LatentSpace, pairs: TinyPairs) -> None:
    methods = {"vluer": tiny_vluer().eval()} | baseline_methods(codec)

    def numbers(batches: list[list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
        comparison = UpsamplingComparison(codec, methods)
        scores = [score for items in batches for score in comparison.score_batch(collate(items))]
        return [(s.scale, s.method, s.clip, s.latent_l1, s.fidelity) for s in gather_scores(scores)]

    by_scale = [pairs.items[:CLIPS], pairs.items[CLIPS:]]
    assert numbers(by_scale) == numbers([[item] for item in reversed(pairs.items)])


def score(clip: str, method: str = "vluer", scale: float = 2.0, value: float = 1.0, ms: float = 1.0) -> ClipScore:
    fidelity = Fidelity(20 + value, 0.5, 0.25)
    return ClipScore(scale, method, clip, 5, 48, 48, value, fidelity, Cost(ms, 10 * value))


def test_rows_are_means_but_median_time_and_greatest_memory() -> None:
    scores = [score("a", value=1.0, ms=100.0), score("b", value=2.0, ms=3.0), score("c", value=4.5, ms=4.0)]
    [row] = comparison_rows(scores, ["vluer", "unknown"])
    assert row == {
        "scale": 2.0, "method": "vluer", "latent_l1": 2.5, "psnr_rgb": 22.5, "ssim": 0.5, "frame_diff": 0.25,
        "ms": 4.0, "peak_mib": 45.0,
    }  # fmt: skip
    assert list(csv.reader(io.StringIO(table_csv(COLUMNS, [row]))))[1] == [
        "2", "vluer", "2.5", "22.5", "0.5", "0.25", "4", "45",
    ]  # fmt: skip


def test_a_clip_that_comes_twice_counts_once() -> None:
    scores = [score("a", value=1.0), score("b", value=3.0), score("a", value=1.0)]
    [row] = comparison_rows(gather_scores(scores), ["vluer"])
    assert row["latent_l1"] == 2.0


def test_no_score_is_no_row() -> None:
    assert comparison_rows(gather_scores([]), method_names()) == []


@pytest.mark.parametrize(("value", "share"), [(20.0, 0.0), (30.0, 1.0), (24.0, 0.4), (15.0, -0.5), (35.0, 1.5)])
def test_the_share_of_the_gap_that_is_closed(value: float, share: float) -> None:
    values = {"vluer": value, "bilinear": 20.0, "vae": 30.0}
    rows = [{"scale": s, "method": m, "psnr_rgb": v + s - 2} for s in SCALES for m, v in values.items()]
    assert closed_gap(rows, 2.0, "vluer") == pytest.approx(share)
    assert closed_gap(rows, 1.5, "vluer") == pytest.approx(share)
    assert math.isnan(closed_gap(rows, 3.0, "vluer"))
    assert math.isnan(closed_gap(rows, 2.0, "nearest"))
    level = [row | {"psnr_rgb": 20.0} for row in rows]
    assert math.isnan(closed_gap(level, 2.0, "vluer"))


def table(run: Run) -> list[list[str]]:
    """The CSV without time and memory."""
    return [line[:6] for line in csv.reader((run.folder / "comparison.csv").read_text().splitlines())]


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(tiny_backbone: Path, tmp_path: Path) -> None:
    shards = {
        "one": [[0, 1, 2, 3, 4, 5]],
        "uneven, one clip twice": [[0, 1, 2, 3, 4], [5, 0]],
        "empty": [[5, 3, 4, 0, 2, 1], []],
    }
    tables = {}
    for name, parts in shards.items():
        task = {"backbone": tiny_backbone, "shards": parts}
        run = Run(tmp_path / name, processes=len(parts), task=task)
        assert run_processes(run, compare) == [0] * len(parts), (run.folder / "output-0.txt").read_text()
        tables[name] = table(run)
    assert len(tables["one"]) == 1 + len(SCALES) * len(method_names())
    assert tables["uneven, one clip twice"] == tables["one"]
    assert tables["empty"] == tables["one"]
