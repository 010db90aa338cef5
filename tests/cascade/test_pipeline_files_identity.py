"""What tells models apart: their files' content, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from luve_lightning.cascade.pipeline_files import model_identity
from luve_lightning.data.hashes import FileHashes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "vae" / "weights.safetensors").write_bytes(b"weights")
    return folder


def test_content_and_names_count_and_nothing_else(model: Path, tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "hashes")
    identity = model_identity(model, hashes)
    assert identity.startswith("sha256:")
    other = tmp_path / "elsewhere"
    shutil.copytree(model, other)
    (other / "README.md").write_text("A model.")
    (other / ".cache").mkdir()
    (other / ".cache" / "x.json").write_text("1")
    assert model_identity(str(other), hashes) == identity
    (other / "vae" / "weights.safetensors").rename(other / "vae" / "other.safetensors")
    renamed = model_identity(other, hashes)
    (other / "vae" / "other.safetensors").write_bytes(b"Weights")
    assert len({identity, renamed, model_identity(other, hashes)}) == 3


def test_a_single_file(model: Path, tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "hashes")
    file = model / "vae" / "weights.safetensors"
    assert model_identity(file, hashes) == f"sha256:{hashes.digest(file)}"


def test_a_hub_id_is_known_by_the_revision_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hashes = FileHashes(tmp_path / "hashes")
    assert model_identity("some/model", hashes) == f"hub:some/model@{'a' * 40}"
    with pytest.raises(FileNotFoundError, match="not in the hub's cache"):
        model_identity("some/other", hashes)


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model files there"):
        model_identity(tmp_path / "empty", FileHashes(tmp_path))
