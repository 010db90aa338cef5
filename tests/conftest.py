"""Fixtures shared by the tests: a tiny backbone, tiny clips, and thread limits."""

from __future__ import annotations

import csv
import gc
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.seeds import seed_all, seeded_apart

if TYPE_CHECKING:
    from tests.helpers.tiny_flow import World

# Before torch is imported: the tests' tensors are too small to share, and two workers of pytest-xdist on two cores
# would run two threads each and wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs of the mini world take two threads nevertheless. As in `luve`: threads that spin while they wait for each other
# on busy cores made the steps of tests/test_same_numbers.py four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# diffusers looks for a GPU when it is imported. By CUDA, no process that is forked afterwards could use one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may download
os.environ.setdefault("WANDB__SAVE_REQUIREMENTS", "false")  # 200 packages' metadata a run; our record names them, too

os.fsync = lambda descriptor: None  # no test cuts the power, and each file would wait milliseconds for the disk

gc.disable()  # until all is collected: what is imported stays, and looking through it takes a fifth of the time

# How long an example takes, or is drawn, is the machine's business. Examples are the same in every run; `--seed` draws
# others.
ANY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("any machine", ANY_MACHINE)
settings.register_profile("other examples", ANY_MACHINE, derandomize=False)
settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_CLIPS = {"train": 4, "val": 1, "test": 1}  # clips per split; each split has one source video
TINY_FRAMES = 9
TINY_SIZE = 64


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--numbers`: see tests/test_same_numbers.py; `--all-references`: tests/models/vluer/test_released.py."""
    parser.addoption("--seed", type=int, help="draw other random numbers, and hypothesis other examples")
    parser.addoption("--numbers", help="a file of numbers that must stay the same; written where it is missing")
    parser.addoption("--all-references", action="store_true", help="compare with every output of the released VLUer")


def pytest_configure(config: pytest.Config) -> None:
    """Leaves the order of files to the next hook: pytest-xdist would begin with those of most tests."""
    config.option.loadscopereorder = False
    if config.option.seed is not None:
        settings.load_profile("other examples")
        config.option.hypothesis_seed = config.option.hypothesis_seed or str(config.option.seed)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts files with slow tests first where several processes share the files: at the end none waits long."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of each garbage collection: all of it stays until the end.

    What tests import later is looked through again and again: by default in each collection after 70,000 objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Seeds what several tests share: it is the same whichever of them asks for it first."""
    if fixturedef.scope == "function":
        return (yield)
    with seeded_apart(f"{request.config.option.seed} {fixturedef.baseid} {fixturedef.argname}"):
        return (yield)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seeds each test: what it draws does not depend on the tests that ran before it in this process."""
    seed_all(f"{request.config.option.seed} {request.node.nodeid}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone folder: randomly initialised, very small `vae/`, `transformer/`, `text_encoder/` and `tokenizer/`."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from tests.helpers.small_text import write_text_encoder

    folder = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2
        )
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    return write_text_encoder(folder)


@pytest.fixture(scope="session")
def tiny_cascade(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """A folder with `wan/` (the tiny backbone as a whole pipeline), `vluer/`, `refiner/` and `experts/`."""
    from tests.helpers.tiny_cascade import write_cascade

    return write_cascade(tmp_path_factory.mktemp("cascade"), tiny_backbone)


@pytest.fixture(scope="session")
def tiny_places(
    tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, tiny_texts: Path, tiny_cascade: Path
) -> dict[str, str]:
    """What the overlays of tests/conf refer to, but for the folder of a run: environment variables by name."""
    return {
        "TINY_BACKBONE": str(tiny_backbone),
        "TINY_WORLD": str(tiny_clips),
        "TINY_LATENTS": str(tiny_latents),
        "TINY_TEXTS": str(tiny_texts),
        "TINY_CASCADE": str(tiny_cascade),
        "RECOGNISER": str(Path(__file__).resolve().parents[1] / "data" / "mini" / "recogniser"),
    }


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clips.csv` in UltraVideo's format, `splits.json`, and six H.264 clips under `clips/`.

    9 frames of 64x64 at 16 fps; three source videos, one for each split.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "clips").mkdir()
    rows, splits = [], {}
    for number, (split, count) in enumerate(TINY_CLIPS.items()):
        url = f"https://example.com/{split}"
        splits[split] = [url]
        for index in range(count):
            clip_id = f"{number * 100 + index:040x}"
            _write_clip(folder / "clips" / f"{clip_id}.mp4", seed=number * 100 + index)
            rows.append(_row(clip_id, url))
    with (folder / "clips.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture(scope="session")
def tiny_latents(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_clips: Path) -> Path:
    """A latent store of the tiny clips at 48x48 and 1.5, 2 and 3 times smaller, made by `luve precompute`."""
    from luve_lightning.__main__ import main

    store = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_BACKBONE", str(tiny_backbone))
        patch.setenv("TINY_WORLD", str(tiny_clips))
        patch.setenv("TINY_LATENTS", str(store))
        names = ("experiments/precompute/mini.yaml", "tests/conf/precompute/mini.yaml")
        options = [word for name in names for word in ("--config", str(REPOSITORY / name))]
        assert main(["precompute", *options]) == 0
    return store


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_clips: Path) -> Path:
    """A store of the tiny captions' embeddings, made by `luve embed`."""
    from luve_lightning.__main__ import main

    store = tmp_path_factory.mktemp("texts")
    values = {"backbone": tiny_backbone, "index": tiny_clips / "clips.csv", "store": store, "length": 16}
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert main(["embed", *options, "--dtype", "float32", "--device", "cpu"]) == 0
    return store


@pytest.fixture(scope="session")
def world(tiny_backbone: Path, tiny_clips: Path, tiny_latents: Path, tiny_texts: Path) -> World:
    """All that a task takes, tiny: four clips to train on, one held out for each of the other splits."""
    from tests.helpers.tiny_flow import World

    return World(tiny_backbone, tiny_clips, tiny_latents, tiny_texts)


@pytest.fixture(scope="session")
def held_out_world(
    tiny_backbone: Path,
    tiny_clips: Path,
    tiny_latents: Path,
    tiny_texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """The tiny world with its splits swapped: four clips held out, one to train on."""
    from tests.helpers.tiny_flow import World

    whole = World(tiny_backbone, tiny_clips, tiny_latents, tiny_texts)  # `world` may be another one in a file
    return whole.resplit(tmp_path_factory.mktemp("split") / "world", train="val", val="train", test="test")


def _write_clip(path: Path, seed: int) -> None:
    """Writes a coarse random texture that drifts two pixels a frame."""
    import av
    import numpy as np

    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (TINY_SIZE // 8, TINY_SIZE // 8 + 4, 3), dtype=np.uint8)
    texture = coarse.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        # x264's macroblock tree reads memory that nothing wrote: same frames, other bytes.
        options = {"crf": "10", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=16, options=options)
        stream.width = stream.height = TINY_SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(TINY_FRAMES):
            pixels = np.ascontiguousarray(texture[:, 2 * index : 2 * index + TINY_SIZE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _row(clip_id: str, url: str) -> dict[str, object]:
    """One line of the CSV: UltraVideo's 24 columns, in its order."""
    seconds = TINY_FRAMES / 16
    numbers = {
        "clip_id": clip_id,
        "url": url,
        "frame_width": TINY_SIZE,
        "frame_height": TINY_SIZE,
        "fps": 16.0,
        "start_frame": 0,
        "end_frame": TINY_FRAMES,
        "total_frames": TINY_FRAMES,
        "start_time": 0.0,
        "end_time": seconds,
        "duration": seconds,
        "vtss_score": 1.0,
        "motion_score": 1.0,
        "video_clip_score": 1.0,
    }
    captions = (
        "Brief Description",
        "Detailed Description",
        "Background",
        "Theme Description",
        "Style",
        "Shot Type",
        "Camera Movement",
        "Lighting",
        "Video Atmosphere",
        "Summarized Description",
    )
    return {**numbers, **dict.fromkeys(captions, "Coloured squares drift to the left.")}
