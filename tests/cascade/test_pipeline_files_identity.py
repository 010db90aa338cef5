"""What tells models apart: their files' content, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from luve_lightning.cascade.pipeline_files import model_identity
from luve_lightning.data.hashes import FileHashes
from tests.helpers.tiny_wan import tiny_transformer
from tests.helpers.wan_files import own_config, own_weights, write_weights


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


def test_a_transformers_file_counts_with_its_shards_and_the_configuration_it_needs(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "hashes")
    transformer = tiny_transformer()
    weights = list(own_weights(transformer).items())
    file = write_weights(tmp_path / "whole" / "a.safetensors", dict(weights))
    assert model_identity(file, hashes) == f"sha256:{hashes.digest(file)}"
    config = file.with_name("config.json")
    config.write_text(json.dumps(own_config(transformer)))
    assert model_identity(file, hashes) == f"sha256:{hashes.digest(file)}+{hashes.digest(config)}"
    lora = write_weights(file.with_name("lora.safetensors"), {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)})
    assert model_identity(lora, hashes) == f"sha256:{hashes.digest(lora)}", "as before there were such files"
    shards = [tmp_path / f"b-{i + 1:05d}-of-00002.safetensors" for i in (0, 1)]
    for i, shard in enumerate(shards):
        write_weights(shard, dict(weights[i::2]))
    identities = [model_identity(shard, hashes) for shard in shards]
    assert identities[0] == identities[1]
    write_weights(shards[1], {name: x + 1 for name, x in weights[1::2]})
    assert model_identity(shards[0], hashes) != identities[0]
