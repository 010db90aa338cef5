"""A model's folder is written whole, with the umask's permissions, or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luve_lightning.model_folders import cannot_load
from luve_lightning.models.backbones import load_backbone
from luve_lightning.models.experts import ExpertConfig, add_expert, save_expert
from luve_lightning.models.vluer import VLUer
from tests.helpers.tiny_wan import load_transformer


def save_a_vluer(folder: Path) -> None:
    VLUer(latent_channels=4, channels=8, pairs=1, hidden=8, layers=1, query_channels=8).save_pretrained(folder)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", ["vluer", "expert", "transformer"])
@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_files_follow_the_umask(tmp_path: Path, tiny_backbone: Path, what: str, mask: int) -> None:
    def expert(folder: Path) -> None:
        transformer = load_transformer(tiny_backbone)
        add_expert(transformer, "lfe", ExpertConfig("attention", rank=2))
        save_expert(transformer, "lfe", folder)

    save: dict[str, Callable[[Path], None]] = {
        "vluer": save_a_vluer,
        "expert": expert,
        "transformer": lambda folder: load_backbone(tiny_backbone).denoiser().save(folder, torch.float16),
    }
    before = os.umask(mask)
    try:
        save[what](tmp_path / "model")
    finally:
        os.umask(before)
    found = modes(tmp_path / "model")
    assert any(name.endswith(".safetensors") for name in found)
    assert set(found.values()) == {0o666 & ~mask}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_error_of_the_system_is_one_and_leaves_the_old_model(tmp_path: Path) -> None:
    """safetensors hides it in a text of its own."""
    folder = tmp_path / "model"
    save_a_vluer(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*/model'$"):
            save_a_vluer(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


class LocalEntryNotFoundError(FileNotFoundError):
    """By name the hub's own error, which takes a response to be made."""


class RepositoryNotFoundError(OSError):
    """Likewise."""


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (LocalEntryNotFoundError("cannot find the files"), "it cannot be reached (Name or service not known), and"),
        (RepositoryNotFoundError("404"), "it knows no such repository, or one that needs a login"),
        (PermissionError(13, "Permission denied", "/home/a/hub"), "/home/a/hub: Permission denied (where downloads"),
        (KeyError("else"), "does not appear to have a file named config.json"),
    ],
)
def test_why_the_hub_gave_nothing_is_said(cause: Exception, expected: str) -> None:
    cause.__context__ = ConnectionError("Name or service not known")
    error = OSError("Wan-AI/Wan does not appear to have a file named config.json.")
    error.__cause__ = cause
    message = str(cannot_load("Wan-AI/Wan", "vae", error))
    assert message.startswith("backbone Wan-AI/Wan: no such folder, and its vae/ is not available from the hub: ")
    assert expected in message
    assert message.endswith("; a local pipeline folder works without the hub")
