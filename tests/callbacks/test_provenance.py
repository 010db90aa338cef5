from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from luve_lightning.callbacks.provenance import Provenance


def test_numbers_follow_each_other_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = Provenance("fit", "a: 1\n").write(tmp_path / "run", {"verb": "fit"})
    second = Provenance("test", "a: 2\n").write(tmp_path / "run", {"verb": "test"})
    assert (first.name, second.name) == ("provenance.json", "provenance-2.json")
    assert json.loads(first.read_text()) == {"verb": "fit", "config": "config.yaml"}
    assert json.loads(second.read_text()) == {"verb": "test", "config": "config-2.yaml"}
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "run" / "config-2.yaml").read_text() == "a: 2\n"
    assert len(list((tmp_path / "run").iterdir())) == 4  # no temporary file stays


def test_writers_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    def write(number: int) -> Path:
        return Provenance("fit", f"n: {number}\n").write(tmp_path, {"n": number})

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(write, range(24)))
    assert len(set(paths)) == 24
    for number, path in enumerate(paths):
        provenance = json.loads(path.read_text())
        assert provenance["n"] == number
        assert (tmp_path / provenance["config"]).read_text() == f"n: {number}\n"
