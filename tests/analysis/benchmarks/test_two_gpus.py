"""`luve bench --subject two-gpus` with a tiny transformer and two processes of a CPU; tests/gpu runs it on two GPUs."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch

from luve_lightning.analysis.benchmarks import two_gpus
from luve_lightning.analysis.benchmarks.experts import BenchModel
from luve_lightning.cli.costs import bench
from luve_lightning.models.attention.windows import Windows
from tests.helpers.fork_server import start_server

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3, "text_dim": 8}


@pytest.fixture(autouse=True)
def _server() -> None:
    """The one that has imported everything makes the benchmark's processes."""
    start_server()


@pytest.mark.slow
def test_two_devices_make_the_step_of_one_with_twice_the_batch(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BenchModel("tiny", SIZES, 6, (2, 8, 8), torch.float32)
    monkeypatch.setattr(two_gpus, "bench_model", lambda _: model)
    attention = Windows(((3, 1, 1), (1, 2, 2)))
    bench(
        "two-gpus",
        device="cpu",
        attention=attention,
        small=(3, 6, 8),
        precision="32-true",
        blocks=2,
        keep_attention=1,
        compile=False,
    )
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["task"], row["strategy"], row["what"]) for row in rows] == [
        *(("adaptation", "fsdp2", what) for what in ("swapped", "apart", "two devices")),
        *(("lfe", "ddp", what) for what in ("swapped", "apart", "two devices")),
        ("adaptation", "fsdp2", "step"),
    ]
    assert [row["model"] for row in rows] == ["tiny, 2 of 3 blocks"] * 6 + ["tiny"]
    windows = {"name": "Windows", "cuts": [[3, 1, 1], [1, 2, 2]]}
    assert all(windows.items() <= row["attention"].items() for row in rows)
    for row in rows[:6]:
        # A gradient that is a sum instead of a mean differs by 1, one that lacks a sample by as much.
        assert row["gradient"] < 1e-5
        assert row["gradient_worst"] < 1e-4
        assert row["weights"] < 1e-6
        # AdamW's first step is the gradient's sign: rounding turns those of gradients near zero.
        assert row["update"] < 1e-2
    assert prod(rows[6]["latents"]) == 2 * 8 * 8
    assert rows[6]["step_s"] > 0


@pytest.mark.slow
def test_what_fails_has_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_gpus, "bench_model", lambda _: BenchModel("tiny", SIZES, 6, (2, 8, 8), torch.float32))
    odd = (3, 6, 7)  # the transformer takes even widths
    *failed, step = two_gpus.measure(torch.device("cpu"), small=odd, blocks=1, keep_attention=1, compile=False)
    assert [(row["task"], row["what"]) for row in failed] == [("adaptation", "comparison"), ("lfe", "comparison")]
    assert all("latent width 7: the transformer takes multiples of 2" in row["error"] for row in failed)
    assert step["step_s"] > 0


@pytest.mark.parametrize("blocks", [0, 7])
def test_a_depth_that_the_model_lacks_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"blocks: expected 1 to 6, got {blocks}"):
        next(two_gpus.measure(torch.device("cpu"), blocks=blocks))


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_one_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="two-gpus: expected 2 CUDA devices, found "):
        next(two_gpus.measure(torch.device("cuda")))
