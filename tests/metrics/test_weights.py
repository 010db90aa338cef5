"""Where weights are looked for, and what is said when they are nowhere."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from luve_lightning.metrics.base import Unavailable
from luve_lightning.metrics.pretrained import WeightFile

BYTES = b"weights"
FILE = WeightFile(
    "Some network",
    "net.pt",
    95_607_719,
    "https://example.com/net.pt",
    "some_metric",
    caches=("$LIBRARY/hub",),
)
EXACT = replace(FILE, size_bytes=len(BYTES), sha256=hashlib.sha256(BYTES).hexdigest())


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUVE_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def put(path: Path, content: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = put(tmp_path / "library" / "hub" / "net.pt")
    assert FILE.find() == library
    own = put(tmp_path / "own" / "net.pt")
    assert FILE.find() == own
    given = put(tmp_path / "elsewhere" / "renamed.pt")
    assert FILE.find(given) == given
    assert FILE.find(own.parent) == own
    monkeypatch.delenv("LUVE_WEIGHTS")
    assert FILE.find() == library
    home = put(tmp_path / "home" / ".cache" / "luve-lightning" / "net.pt")
    assert FILE.find() == home


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as raised:
        FILE.find()
    assert str(raised.value) == (
        "some_metric needs Some network: net.pt was not found; put net.pt (96 MB, https://example.com/net.pt) into "
        f"{tmp_path / 'own'} or give its path"
    )
    # A given path that is wrong is not made good by another file.
    put(tmp_path / "own" / "net.pt")
    with pytest.raises(Unavailable, match=r"/nowhere/net.pt does not exist; put net.pt \(1.7 GB"):
        replace(FILE, size_bytes=1_710_000_000).find("/nowhere/net.pt")
    with pytest.raises(Unavailable, match=r"put net.pt \(8 kB"):
        replace(FILE, size_bytes=8_150).find("/nowhere/net.pt")


def test_a_file_with_a_known_hash_is_compared(tmp_path: Path) -> None:
    path = put(tmp_path / "net.pt")
    assert EXACT.find_exactly(path) == path
    put(path, BYTES[:-1])
    with pytest.raises(Unavailable, match="has 6 bytes where Some network has 7: cut short"):
        EXACT.find(path)
    put(path, BYTES[::-1])
    assert EXACT.find(path) == path
    with pytest.raises(Unavailable, match="is not Some network: its sha256 differs"):
        EXACT.find_exactly(path)
    assert FILE.find_exactly(path) == path
