"""One run's curves from several files of Lightning's CSVLogger."""

from __future__ import annotations

from pathlib import Path

import pytest

from luve_lightning.reporting.plots import Curve, log_files, read_log


def write(folder: Path, version: int, text: str) -> Path:
    file = folder / "logs" / f"version_{version}" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def plain(curves: dict[str, Curve]) -> dict[str, list[tuple[float, float]]]:
    return {metric: list(zip(*curve, strict=True)) for metric, curve in curves.items()}


def test_a_resume_replaces_and_a_test_is_added(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,val/loss\n0,3,\n10,2,\n10,,2.5\n20,1.5,\n")
    write(tmp_path, 9, "step,train/loss,val/loss\n20,1.4,\n30,1.2,\n30,,1.9\n")
    write(tmp_path, 10, "step,test/loss_after\n0,0.7\n")
    write(tmp_path, 11, "step,val/loss\n0,9\n")  # `luve validate`, of a checkpoint
    (files,) = log_files(tmp_path).values()
    assert [file.parent.name for file in files] == [f"version_{n}" for n in (0, 9, 10, 11)]
    assert plain(read_log(files)) == {
        "train/loss": [(0, 3), (10, 2), (20, 1.4), (30, 1.2)],
        "val/loss": [(10, 2.5), (30, 1.9)],
        "test/loss_after": [(0, 0.7)],
    }


def test_runs_below_a_folder_stay_apart(tmp_path: Path) -> None:
    for name in ("lfe", "hfe"):
        write(tmp_path / name, 0, "step,train/loss\n0,1\n")
    (tmp_path / "lfe" / "logs" / "version_0" / "strips").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert set(log_files(tmp_path)) == {tmp_path / "lfe", tmp_path / "hfe"}


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, 0, "epoch,step,train/loss,lr\n0,0,nan,\n0,5,1.0,1e-3\n0,6,0.\n0,seven,2,\n0,8")
    assert plain(read_log([file])) == {"train/loss": [(5, 1.0), (6, 0.0)], "lr": [(5, 1e-3)]}


def test_another_csv_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, 0, "scale,method\n2,vluer\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: expected a CSVLogger's file, it has no column step"):
        read_log([file])
