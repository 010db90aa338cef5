"""The VAE's fingerprint is remembered by its files' bytes, and never when they have changed."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from luve_lightning.datamodules.base import vae_fingerprint
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.backbones.wan import WanBackbone
from tests.helpers.small_world import write_backbone
from tests.helpers.unwritable import forbid_writing


def settle(folder: Path) -> None:
    """Files changed within the last two seconds are hashed again: set them back."""
    past = time.time() - 60
    for file in (folder / "vae").iterdir():
        os.utime(file, (past, past))


def test_it_is_the_codecs_own_and_loads_the_vae_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    settle(backbone)
    loads: list[str] = []
    load = WanBackbone.vae

    def counted(self: WanBackbone, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
        loads.append(str(self.path))
        return load(self, dtype)

    monkeypatch.setattr(WanBackbone, "vae", counted)
    first, second = (vae_fingerprint(str(backbone), tmp_path / "store") for _ in range(2))
    assert len(loads) == 1
    assert first == second == load_backbone(backbone).latent_space().fingerprint()


def test_other_weights_in_the_same_folder_are_noticed(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone", seed=0)
    before = vae_fingerprint(str(backbone), tmp_path / "store")
    write_backbone(backbone, seed=1)
    after = vae_fingerprint(str(backbone), tmp_path / "store")
    assert after == load_backbone(backbone).latent_space().fingerprint() != before


def test_other_statistics_in_the_configuration_are_noticed(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    before = vae_fingerprint(str(backbone), tmp_path / "store")
    write_backbone(backbone, latents_std=2.0)
    assert vae_fingerprint(str(backbone), tmp_path / "store") != before


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    right = vae_fingerprint(str(backbone), tmp_path / "store")
    (record,) = (tmp_path / "store" / "vaes").iterdir()
    record.write_text("half")
    assert vae_fingerprint(str(backbone), tmp_path / "store") == right
    assert record.read_text().strip() == right


@pytest.mark.parametrize("backbone", ["nowhere", "some/where/else"])
def test_a_missing_backbone_is_one_line(tmp_path: Path, backbone: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected a diffusers pipeline folder or a hub id"):
        vae_fingerprint(backbone, tmp_path)


def test_a_store_that_may_not_be_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, store = write_backbone(tmp_path / "backbone"), tmp_path / "store"
    store.mkdir()
    forbid_writing(monkeypatch, store, errno.EROFS)
    with pytest.warns(UserWarning, match=f"{store}: cannot be written .Read-only file system.: .*kept in memory"):
        assert vae_fingerprint(str(backbone), store) == load_backbone(backbone).latent_space().fingerprint()
    assert list(store.iterdir()) == []
