"""What `luve fit` does around Lightning."""

from __future__ import annotations

from pathlib import Path

from luve_lightning.commands.training import set_aside


def test_an_earlier_runs_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert set_aside(folder) is None
    folder.mkdir()
    assert set_aside(folder) is None
    for number in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / "last.ckpt").write_bytes(bytes([number]))
        assert set_aside(folder) == tmp_path / f"checkpoints-{number}"
        assert not folder.exists()
    assert (tmp_path / "checkpoints-1" / "last.ckpt").read_bytes() == b"\x01"
    assert (tmp_path / "checkpoints-2" / "last.ckpt").read_bytes() == b"\x02"
