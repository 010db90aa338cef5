"""The comparison as a callback of `trainer.test` and `trainer.validate`."""

from __future__ import annotations

import csv
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from luve_lightning.callbacks import UpsamplerComparison
from luve_lightning.evaluation.upsampling_comparison import method_names
from luve_lightning.models.vluer import VLUer
from luve_lightning.tasks import VLUerTask
from tests.helpers.upsampling import Shards, TinyPairs, tiny_task, tiny_vluer

HEADER = "scale,method,latent_l1,psnr_rgb,ssim,frame_diff,ms,peak_mib"
METHODS = method_names()
Table = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def pairs(tiny_backbone: Path) -> TinyPairs:
    return TinyPairs(tiny_backbone, clips=2)


def make_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


def evaluate(
    verb: str, task: VLUerTask, pairs: TinyPairs, callback: UpsamplerComparison, batch_size: int = 1, **options: Any
) -> None:
    data = Shards(pairs, [list(range(len(pairs)))], batch_size)
    getattr(make_trainer(callback, **options), verb)(task, data, verbose=False)


def read(path: Path) -> Table:
    return {(row["scale"], row["method"]): row for row in csv.DictReader(path.read_text().splitlines())}


def fidelity(row: dict[str, str]) -> list[str]:
    """The columns that do not depend on the machine."""
    return [row[name] for name in ("latent_l1", "psnr_rgb", "ssim", "frame_diff")]


def test_test_writes_prints_and_logs(
    tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "comparison.csv"
    logger = CSVLogger(tmp_path, name="log", version=0)
    evaluate("test", tiny_task(tiny_backbone), pairs, UpsamplerComparison(output), logger=logger)

    assert output.read_text().splitlines()[0] == HEADER
    rows = read(output)
    assert list(rows) == [(scale, method) for scale in ("1.5", "2") for method in METHODS]
    for row in rows.values():
        assert all(value != "" for value in row.values())
        assert float(row["psnr_rgb"]) > 0
    assert fidelity(rows["2", "vae"]) == fidelity(rows["1.5", "vae"])
    assert rows["2", "vae"]["latent_l1"] == rows["2", "vae"]["ms"] == rows["2", "vae"]["peak_mib"] == "0"
    assert float(rows["2", "vluer"]["ms"]) > 0

    printed = capsys.readouterr().out
    for word in [*METHODS, *HEADER.split(",")[1:], "test, 1.5x", "test, 2x"]:
        assert word in printed
    bilinear, vluer, vae = (float(rows["2", m]["psnr_rgb"]) for m in ("bilinear", "vluer", "vae"))
    share = 100 * (vluer - bilinear) / (vae - bilinear)
    [line] = re.findall(r"vluer closes (\S+) % of the PSNR_rgb gap between bilinear and vae at 2x", printed)
    assert float(line) == pytest.approx(share, rel=0.05, abs=1)

    text = output.with_suffix(".md").read_text()
    for fact in (
        "- split: test",
        "- clips: 2",
        "- clips whose time was taken: 2",
        "5, 48 x 48",
        "1 process(es)",
        f"torch {version('torch')}",
        "## 1.5x",
    ):
        assert fact in text
    assert "- checkpoint: the weights in memory, at step 0" in text
    assert text.count("| vluer |") == 2

    [logged] = list(csv.DictReader((tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()))
    assert float(logged["test/x2/vluer/psnr_rgb"]) == pytest.approx(vluer, rel=1e-4)
    assert float(logged["test/x2/vluer/gap_closed"]) == pytest.approx(share / 100, rel=0.05, abs=0.01)
    assert len([name for name in logged if name.startswith("test/")]) == 2 * (6 * len(METHODS) + 1)


def test_the_checkpoint_is_named(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    task, checkpoint = tiny_task(tiny_backbone, seed=1), tmp_path / "some.ckpt"
    trainer = make_trainer()
    trainer.strategy.connect(task)
    trainer.save_checkpoint(checkpoint, weights_only=True)
    callback = UpsamplerComparison(tmp_path / "table.csv")
    data = Shards(pairs, [[0]])
    make_trainer(callback).test(tiny_task(tiny_backbone), data, ckpt_path=checkpoint, verbose=False)
    assert f"- checkpoint: {checkpoint}\n" in (tmp_path / "table.md").read_text()
    # Its weights were compared, not those the task began with.
    evaluate("test", task, pairs, UpsamplerComparison(tmp_path / "same.csv"), limit_test_batches=1)
    tables = [read(tmp_path / name) for name in ("table.csv", "same.csv")]
    assert fidelity(tables[0]["1.5", "vluer"]) == fidelity(tables[1]["1.5", "vluer"])


def test_validate_writes_beside_and_fit_does_not(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    output = tmp_path / "comparison.csv"
    output.write_text("the test split's")
    task, callback = tiny_task(tiny_backbone), UpsamplerComparison(output)
    evaluate("validate", task, pairs, callback)
    assert output.read_text() == "the test split's"
    written = tmp_path / "comparison-validate.csv"
    assert list(read(written)) == [(scale, method) for scale in ("1.5", "2") for method in METHODS]
    assert "- split: validation" in written.with_suffix(".md").read_text()

    written.unlink()
    trainer = make_trainer(callback, max_steps=2, val_check_interval=1, enable_checkpointing=False)
    trainer.fit(task, Shards(pairs, [list(range(len(pairs)))]))
    assert "val/psnr_rgb" in trainer.callback_metrics
    assert not written.exists()
    assert output.read_text() == "the test split's"


def test_an_untrained_vluer_closes_nothing(
    tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tiny_task(tiny_backbone)
    nn.init.zeros_(task.net.decoder.conv_out.weight)
    evaluate("test", task, pairs, UpsamplerComparison(tmp_path / "table.csv"), batch_size=2)
    rows, printed = read(tmp_path / "table.csv"), capsys.readouterr().out
    for scale in ("1.5", "2"):
        assert fidelity(rows[scale, "vluer"]) == fidelity(rows[scale, "bilinear"])
        bilinear, vae = (float(rows[scale, method]["psnr_rgb"]) for method in ("bilinear", "vae"))
        line = f"vluer closes 0.0 % of the PSNR_rgb gap between bilinear and vae at {scale}x"
        assert (line in printed) == (vae > bilinear)


@pytest.mark.slow
def test_further_vluers_have_rows_of_their_own(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    tiny_vluer(0).save_pretrained(tmp_path / "same")
    tiny_vluer(1).save_pretrained(tmp_path / "other")
    extra = {"vluer_same": tmp_path / "same", "vluer_other": tmp_path / "other"}
    callback = UpsamplerComparison(tmp_path / "table.csv", extra)
    for _ in range(2):  # a callback serves several runs
        evaluate("test", tiny_task(tiny_backbone, seed=0), pairs, callback)
    rows = read(tmp_path / "table.csv")
    assert [method for scale, method in rows if scale == "2"] == ["vluer", "vluer_same", "vluer_other", *METHODS[1:]]
    assert fidelity(rows["2", "vluer"]) == fidelity(rows["2", "vluer_same"])
    assert fidelity(rows["2", "vluer"]) != fidelity(rows["2", "vluer_other"])
    assert (tmp_path / "table.md").read_text().count("vluer_other closes") == 2
    assert "- clips: 2\n" in (tmp_path / "table.md").read_text()


def test_the_vluer_runs_in_the_trainers_precision(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    tables = {}
    for precision in ("32-true", "bf16-mixed"):
        callback = UpsamplerComparison(tmp_path / f"{precision}.csv")
        evaluate("test", tiny_task(tiny_backbone), pairs, callback, precision=precision, limit_test_batches=1)
        tables[precision] = read(tmp_path / f"{precision}.csv")
        assert f"- precision: {precision}" in (tmp_path / f"{precision}.md").read_text()
    full, mixed = tables["32-true"], tables["bf16-mixed"]
    assert fidelity(full["1.5", "vluer"]) != fidelity(mixed["1.5", "vluer"])
    assert float(full["1.5", "vluer"]["psnr_rgb"]) == pytest.approx(float(mixed["1.5", "vluer"]["psnr_rgb"]), abs=0.1)
    assert fidelity(full["1.5", "rgb_bicubic"]) == fidelity(mixed["1.5", "rgb_bicubic"])


def test_a_fast_dev_run_leaves_the_table_alone(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    output = tmp_path / "table.csv"
    output.write_text("of all clips")
    evaluate("test", tiny_task(tiny_backbone), pairs, UpsamplerComparison(output), fast_dev_run=True)
    assert output.read_text() == "of all clips"
    assert list(tmp_path.iterdir()) == [output]


def test_it_holds_nothing_that_a_checkpoint_would_save(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    task, callback = tiny_task(tiny_backbone), UpsamplerComparison(tmp_path / "table.csv")
    names = set(task.state_dict())
    evaluate("test", task, pairs, callback, limit_test_batches=1)
    assert set(task.state_dict()) == names
    assert callback.state_dict() == {}
    assert callback.comparison is None


def test_what_cannot_be_compared_is_refused(tiny_backbone: Path, pairs: TinyPairs, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"extra: shipped: .*none has no config\.json; expected a saved VLUer"):
        UpsamplerComparison(tmp_path / "table.csv", {"shipped": tmp_path / "none"})
    with pytest.raises(ValueError, match=r"output: expected a file that ends in \.csv"):
        UpsamplerComparison(tmp_path / "table")
    VLUer(latent_channels=4, channels=4, pairs=1, hidden=4, query_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="has a method of that name already"):
        UpsamplerComparison(tmp_path / "table.csv", {"vae": tmp_path / "four"})
    callback = UpsamplerComparison(tmp_path / "table.csv", {"four": tmp_path / "four"})
    with pytest.raises(ValueError, match=r"extra: four: .* takes 4 latent channels, the VAE has 16"):
        evaluate("test", tiny_task(tiny_backbone), pairs, callback)
