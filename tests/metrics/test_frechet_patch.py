"""The distance against clean-fid's on the same patches, over processes, and under every cast."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid
from PIL import Image

from luve_lightning.functional.patches import PatchPlan
from luve_lightning.metrics.feature_moments import FeatureMoments, FeatureStatistics, GroupedMoments
from luve_lightning.metrics.frame_networks import InceptionFeatures
from luve_lightning.metrics.frechet_patch import FIDPatch, FrechetPatchDistance
from tests.helpers.patch_features import PLAN, StubFeatures, distance_of_shard, stub_metric, stub_network, stub_video
from tests.helpers.processes import run_processes
from tests.helpers.resumable import Run

VIDEOS = (1, 2, 3, 4)
# Relative: features are float32, and some processors' convolutions round by where in memory their input lies.
ROUNDING = 1e-7


def write_patches(folder: Path, seeds: range | tuple[int, ...]) -> Path:
    folder.mkdir()
    for seed in seeds:
        for number, patch in enumerate(PLAN.cut(stub_video(seed), str(seed))):
            Image.fromarray(patch.permute(1, 2, 0).numpy()).save(folder / f"{seed}-{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def value() -> float:
    """Of four videos in one go."""
    metric = stub_metric()
    for seed in VIDEOS:
        metric.update(stub_video(seed), str(seed))
    return metric.compute().item()


@pytest.mark.slow
def test_equals_clean_fid_on_the_same_patches_as_files(tmp_path: Path, value: float) -> None:
    network = stub_network()
    want = fid.compute_fid(
        str(write_patches(tmp_path / "videos", VIDEOS)),
        str(write_patches(tmp_path / "reference", range(100, 105))),
        mode="clean",
        custom_feat_extractor=network,
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
    )
    assert want > 0.1
    assert value == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path: Path, value: float) -> None:
    for name, shards in {"uneven": [[1, 2, 3], [4]], "empty": [[4, 2, 1, 3], []]}.items():
        run = Run(tmp_path / name, processes=2, task={"shards": shards})
        assert run_processes(run, distance_of_shard) == [0, 0], (run.folder / "output-0.txt").read_text()
        for rank, shard in enumerate(shards):
            saved = torch.load(run.folder / f"rank-{rank}.pt", weights_only=True)
            assert saved["value"].item() == pytest.approx(value, rel=ROUNDING)
            # What a process has of its own is its own again afterwards.
            assert saved["own"].item() == len(shard) * len(PLAN.places(7, 50, 77))


@pytest.mark.slow
def test_features_do_not_depend_on_batches_autocast_or_where_they_are_asked_for(value: float) -> None:
    video = stub_video(1)
    want = stub_metric().features(video, "1")
    assert want.shape == (4 * (2 * 3 + 3), 6)
    torch.testing.assert_close(stub_metric(batch_size=5).features(video, "1"), want, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(stub_metric().features(video, "1"), want, rtol=1e-6, atol=0)
    assert not torch.allclose(stub_metric().features(video, "2"), want)  # other random patches
    assert not want.requires_grad
    grouped = GroupedMoments([stub_metric().features(stub_video(seed), str(seed)) for seed in VIDEOS])
    assert stub_metric().distance(grouped.weighted([1] * len(VIDEOS))) == pytest.approx(value, rel=ROUNDING)


def test_no_cast_of_the_module_changes_states_or_network(value: float) -> None:
    metric = stub_metric()
    for seed in VIDEOS:
        metric.update(stub_video(seed), str(seed))
        metric.to(torch.bfloat16).half().float()
    module = torch.nn.Sequential(metric).to(torch.bfloat16)
    assert metric.feature_sum.dtype == metric.feature_outer.dtype == torch.float64
    assert metric.feature_count.dtype == torch.int64
    assert next(module.parameters()).dtype == torch.float32
    assert metric.compute().item() == value
    assert metric.compute().dtype == torch.float64


def test_memory_is_that_of_one_sum_and_random_numbers_are_left_alone() -> None:
    metric = stub_metric()
    before = torch.get_rng_state()
    for seed in VIDEOS:
        metric.update(stub_video(seed), str(seed))
    metric.compute()
    assert torch.equal(before, torch.get_rng_state())
    held = [t for t in metric.metric_state.values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in held) == 1 + 6 + 36


def test_reset_copy_and_pickle(value: float) -> None:
    metric = stub_metric()
    metric.update(stub_video(9), "9")
    metric.reset()
    for seed in VIDEOS[:2]:
        metric.update(stub_video(seed), str(seed))
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        for seed in VIDEOS[2:]:
            other.update(stub_video(seed), str(seed))
        assert other.compute().item() == pytest.approx(value, rel=1e-12)


def test_only_inceptions_distance_has_fids_name() -> None:
    assert FrechetPatchDistance(PLAN, StubFeatures()).name == "fd_patch_stub"
    assert FrechetPatchDistance(PLAN, InceptionFeatures()).name == "fid_patch"
    assert FIDPatch().name == "fid_patch"
    assert FIDPatch().patches == PatchPlan(size=256, placement="grid", frames=8)

    class Pretender(StubFeatures):
        name, kind = "inception-clean", "inception"

    assert FrechetPatchDistance(PLAN, Pretender()).name == "fd_patch_inception"


def test_a_reference_made_otherwise_is_refused(tmp_path: Path) -> None:
    moments = FeatureMoments.from_features(stub_metric().features(stub_video(1)))
    statistics = FeatureStatistics(moments, PLAN, "stub-1", "videos", "0" * 64, 1)
    path = tmp_path / "r.safetensors"
    statistics.save(path)
    metric = FrechetPatchDistance(PLAN, StubFeatures(), reference=path)
    metric.prepare("cpu")
    metric.update(stub_video(1))
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"patches.size 24 there and 16 here"):
        FrechetPatchDistance(replace(PLAN, size=16), StubFeatures(), reference=path).prepare("cpu")
    with pytest.raises(ValueError, match="extractor other there and stub-1 here"):
        metric.use_reference(replace(statistics, extractor="other"))
    with pytest.raises(ValueError, match="is a folder; give the statistics"):
        metric.use_reference(tmp_path)


def test_what_cannot_be_measured_is_one_line() -> None:
    metric = stub_metric()
    with pytest.raises(ValueError, match=r"^frames are 20x77, smaller than a patch of 24"):
        metric.update(stub_video(1)[:, :20])
    with pytest.raises(ValueError, match=r"^fd_patch_stub: frames must be uint8 T x H x W x 3, got float32"):
        metric.update(stub_video(1).float())
    with pytest.raises(ValueError, match=r"^fd_patch_stub: needs at least 2 patches, got 0$"):
        metric.compute()
    one = FrechetPatchDistance(PatchPlan(size=24, grid=(1, 1)), StubFeatures())
    with pytest.raises(RuntimeError, match=r"call prepare\(device\)"):
        one.update(stub_video(1))
    one.prepare("cpu")
    with pytest.raises(ValueError, match="nothing to compare with; give a reference"):
        one.compute()
    one.use_reference(replace(stub_statistics(), plan=one.patches))
    one.update(stub_video(1, frames=1))
    with pytest.raises(ValueError, match=r"needs at least 2 patches, got 1$"):
        one.compute()
    with pytest.raises(ValueError, match="batch_size 0"):
        FrechetPatchDistance(PLAN, StubFeatures(), batch_size=0)


def stub_statistics() -> FeatureStatistics:
    moments = FeatureMoments.from_features(torch.from_numpy(np.random.default_rng(0).normal(size=(20, 6))))
    return FeatureStatistics(moments, PLAN, "stub-1", "numbers", "0" * 64, 1)


def test_a_configuration_builds_it(tmp_path: Path) -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, FrechetPatchDistance | None])
    config = {
        "fid_patch": {"class_path": "luve_lightning.metrics.FIDPatch"},
        "fd": {
            "class_path": "luve_lightning.metrics.FrechetPatchDistance",
            "init_args": {
                "patches": {"size": 64, "grid": [2, 2]},
                "extractor": {"class_path": "tests.helpers.patch_features.StubFeatures"},
                "reference": "some/file.safetensors",
            },
        },
        "off": None,
    }
    metrics = parser.instantiate(parser.parse_object({"metrics": config})).metrics
    assert metrics["off"] is None
    assert metrics["fid_patch"].patches == PatchPlan()
    assert metrics["fd"].patches == PatchPlan(size=64, grid=(2, 2))
    assert Path(metrics["fd"].reference) == Path("some/file.safetensors")
