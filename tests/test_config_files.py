from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from luve_lightning.cli.compose import compose
from luve_lightning.cli.keys import import_class
from luve_lightning.config_files import MOVED, CompositionError, exporting, read_config
from luve_lightning.models.attention import Attention
from luve_lightning.models.experts import ExpertConfig


def bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * width) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "expected a mapping of keys, got a list"),
        (b"a red boat\n", "expected a mapping of keys, got a text"),
        (b"5\n", "expected a mapping of keys"),
        (b"a: 1\nb: 2\na: 3\n", r"x\.yaml:3: not valid YAML: found duplicate key a"),
        (b"a:\n  b: 1\n  b: 2\n", r"x\.yaml:3: not valid YAML: found duplicate key b"),
        (b"a:\n\tb: 1\n", r"x\.yaml:2: not valid YAML: found character"),
        (b"\x89PNG\r\n\x1a\n", "not YAML: byte 0 is no UTF-8 text"),
        (b"a: \x00\x01\n", "not valid YAML: unacceptable character"),
        (b"a: 1\n---\nb: 2\n", r"x\.yaml:2: not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"a: " + b"{b: " * 900 + b"1" + b"}" * 900, "nested too deeply"),
        (bomb(9, 9).encode(), "its aliases stand for more than 100000 values"),
        (b"a: &a [1, *a]\n", "an alias contains itself"),
    ],
    ids=lambda value: str(value[:16]),
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(CompositionError, match=message) as caught:
        compose([file])
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_alias_bomb_is_refused_without_being_expanded(tmp_path: Path) -> None:
    """Its 10^30 values would not end."""
    file = tmp_path / "x.yaml"
    file.write_text(bomb(30, 10))
    with pytest.raises(CompositionError, match="its aliases stand for more"):
        read_config(file)


def test_aliases_and_merge_keys_of_a_usual_size_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfbase: &b {x: 1e-4}\nmore: {<<: *b, y: 2}\nsame: *b\n")
    assert read_config(file) == {"base": {"x": 1e-4}, "more": {"x": 1e-4, "y": 2}, "same": {"x": 1e-4}}


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("a: 1\n")
    assert read_config(Path("~/x.yaml")) == {"a": 1}
    with pytest.raises(CompositionError, match="no such file: ~nobody-here/x"):
        read_config(Path("~nobody-here/x.yaml"))


def test_a_pipe_is_a_file_and_a_folder_is_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("a: 1\n"))
    writer.start()
    assert compose([pipe], [("b", "2")]) == {"a": 1, "b": "2"}
    writer.join()
    with pytest.raises(CompositionError, match="is a folder"):
        read_config(tmp_path)
    with pytest.raises(CompositionError, match="no such file"):
        read_config(tmp_path / "nosuch")


def test_a_file_is_laid_over_those_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "run.yaml").write_text(
        "seed: 0\nsave: {class_path: a.Save, init_args: {n: 1}}\nloggers: {csv: {class_path: a.Log}}\n"
    )
    (tmp_path / "base" / "gpu.yaml").write_text("extends: run.yaml\ndevice: cuda\nseed: 1\n")
    own = tmp_path / "own.yaml"
    own.write_text("extends: base/gpu.yaml\nsave: {init_args: {m: 2}}\nloggers: {csv: null}\nfolder: ${device}\n")
    save = {"class_path": "a.Save", "init_args": {"n": 1, "m": 2}}
    assert compose([own]) == {"seed": 1, "save": save, "device": "cuda", "folder": "cuda", "loggers": {}}
    # A second file that extends the same base sets what stands there again, and nothing else.
    other = tmp_path / "other.yaml"
    other.write_text("extends: [base/gpu.yaml, base/run.yaml]\n")
    assert compose([own, other])["seed"] == 0
    assert compose([own, other], [("device", "cpu")])["folder"] == "cpu"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x.yaml", r"x\.yaml: extends: x\.yaml extends this file itself"),
        ("[y.yaml]", r"y\.yaml: extends: x\.yaml extends this file itself"),
        ("z.yaml", r"x\.yaml: extends: no such file: .*z\.yaml"),
        ("{a: 1}", r"x\.yaml: extends: expected a file or a list of files"),
        ("[1]", r"x\.yaml: extends: expected a file or a list of files"),
        (".", r"x\.yaml: extends: expected a YAML file, .* is a folder"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(f"extends: {value}\n")
    (tmp_path / "y.yaml").write_text("extends: x.yaml\n")
    with pytest.raises(CompositionError, match=message):
        read_config(tmp_path / "x.yaml")


def test_what_is_defined_once_is_named_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text("definitions: {round: {class_path: a.Round, init_args: {r: 1}}}\n")
    file = tmp_path / "x.yaml"
    file.write_text(
        "extends: shapes.yaml\nshapes: {one: '${definitions.round}', two: '${definitions.round}'}\n"
        "radii: ['${definitions.round.init_args.r}']\ntext: a ${text2}\ntext2: b\n"
    )
    rounded = {"class_path": "a.Round", "init_args": {"r": 1}}
    composed = compose([file], [("shapes.two.r", "2")])
    assert composed["shapes"] == {"one": rounded, "two": {"class_path": "a.Round", "init_args": {"r": "2"}}}
    assert (composed["radii"], composed["text"]) == ([1], "a b")
    assert "definitions" not in composed
    file.write_text("extends: shapes.yaml\nshapes: {one: '${definitions.square}'}\n")
    message = r"x\.yaml: shapes\.one: \$\{definitions\.square\}: no definition 'square'; known: round"
    with pytest.raises(CompositionError, match=message):
        read_config(file)


def test_a_class_that_has_moved_is_found_where_it_is_now(tmp_path: Path) -> None:
    assert MOVED
    for old, new in MOVED.items():
        (tmp_path / "x.yaml").write_text(f"data: {{class_path: {old}, init_args: {{text: {old}}}}}\n")
        found = read_config(tmp_path / "x.yaml")["data"]
        assert (found["class_path"], found["init_args"]["text"]) == (new, old)
        assert isinstance(import_class(new), type)


def test_what_will_export_a_model_is_found_by_its_run_folder(repository: Path) -> None:
    experiments = repository / "experiments"
    found = exporting(Path("runs/wan2.1/adaptation-4k-windows/export"), experiments)
    assert found is not None
    assert found.file.name == "adaptation-4k-windows.yaml"
    assert type(found.argument("attention", Attention | None)).__name__ == "Windows"
    expert = exporting(Path("runs/wan2.1/experts/hfe-2k"), experiments)
    assert expert is not None
    assert expert.argument("expert", ExpertConfig).places == ("feed_forward",)
    assert exporting(Path("runs/nobody/export"), experiments) is None
