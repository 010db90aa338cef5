"""HPS v3, as far as it goes without its package and its 17 GB of weights."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest

from luve_lightning.data.scorers import HPSv3Scorer, weights_digest


@pytest.mark.skipif(find_spec("hpsv3") is not None, reason="it is installed")
def test_without_the_package_it_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"not installed in this environment; run `make setup-hpsv3`"):
        HPSv3Scorer()


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    file = tmp_path / "HPSv3.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert weights_digest(file) == digest
    file.write_bytes(b"other weights")
    assert weights_digest(file) != digest


def test_the_hub_cache_names_a_file_by_its_digest(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0a" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"not read, so it need not be the real content")
    link = tmp_path / "snapshots" / "main" / "HPSv3.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert weights_digest(link) == "0a" * 32
