"""`luve bench --subject experts-train` on a CPU."""

from __future__ import annotations

import json

import pytest

from luve_lightning.cli.costs import bench


@pytest.mark.slow
def test_a_step_with_what_saves_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.dumps({"name": "Windows", "cuts": [[1, 2, 2]], "ways": "close"})
    options = {"recompute": "blocks", "offload": True, "chunks": 3}
    bench("experts-train", "cpu", 1, tasks="hfe,adaptation", attention=record, **options)
    hfe, adaptation = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (hfe["task"], adaptation["task"]) == ("hfe", "adaptation")
    for row in (hfe, adaptation):
        assert row["attention"] == "Windows(cuts=((1, 2, 2),), ways=close)"
        assert options.items() <= row.items()
        assert row["keep_attention"] is None
        assert 0 < row["attention_share"] < 1
        assert 0 < row["forward_s"] < row["step_s"]


def test_unknown_tasks() -> None:
    with pytest.raises(ValueError, match="tasks: expected some of adaptation, lfe, hfe, got vluer"):
        bench("experts-train", "cpu", 1, tasks="lfe,vluer")
