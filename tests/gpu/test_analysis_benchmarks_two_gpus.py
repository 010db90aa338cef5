"""A training step over two GPUs against one GPU with twice the batch: sharded (FSDP2) and data parallel (DDP)."""

from __future__ import annotations

import pytest
import torch

from luve_lightning.analysis.benchmarks import two_gpus
from luve_lightning.analysis.benchmarks.experts import BenchModel
from tests.helpers.fork_server import start_server
from tests.helpers.gpu import BF16
from tests.helpers.wide_wan import ATTENTIONS, SHORT, SIZES

LIMITS = {"32-true": 1e-5, "bf16-mixed": 4 * BF16}  # of the gradient's difference, where rounding alone makes less


@pytest.mark.two_gpus
def test_two_gpus_make_the_step_of_one_with_twice_the_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windowed adaptation and the LFE, by the tasks' own Trainer; then a compiled step with inputs on the host."""
    model = BenchModel("wide", SIZES, 24, SHORT, torch.float32)
    monkeypatch.setattr(two_gpus, "bench_model", lambda _: model)
    start_server()  # its processes import nothing anew
    options = {"keep_attention": 1, "compile": device.type == "cuda", "offload": True}
    rows = list(two_gpus.measure(device, attention=ATTENTIONS["windows"], small=SHORT, blocks=2, **options))
    assert [row["error"] for row in rows if "error" in row] == []
    *compared, step = rows
    found = {(row["task"], row["precision"], row["what"]): row for row in compared}
    precisions = ["32-true", "bf16-mixed"] if device.type == "cuda" else ["32-true"]
    assert set(found) == {
        (task, precision, what)
        for task in ("adaptation", "lfe")
        for precision in precisions
        for what in ("swapped", "apart", "two devices")
    }
    for task in ("adaptation", "lfe"):
        for precision in precisions:
            rounding = max(found[task, precision, what]["gradient"] for what in ("swapped", "apart"))
            row = found[task, precision, "two devices"]
            # A gradient that is a sum instead of a mean differs by 1, one that lacks a sample by as much.
            assert row["gradient"] < max(2 * rounding, LIMITS[precision]), (row, rounding)
            assert row["gradient"] < 0.1
            # AdamW's first step is the gradient's sign, whatever its size.
            assert row["weights"] < 1e-3
    assert step["what"] == "step"
    assert step["step_s"] > 0
