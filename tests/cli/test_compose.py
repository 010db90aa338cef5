from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.cli.compose import compose, drop_nulls, named_options, read_arguments
from luve_lightning.config_files import CompositionError, merge

keys = st.sampled_from(["a", "b", "c"])
trees = st.recursive(
    st.integers() | st.none() | st.lists(st.integers()),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)


def write(folder: Path, *contents: dict[str, Any]) -> list[Path]:
    files = [folder / f"{number}.yaml" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(yaml.safe_dump(content))
    return files


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in leaves(value, (*path, key)).items()}


def test_words_are_sorted() -> None:
    arguments = read_arguments(
        ["--config", "a.yaml", "-c", "b.yaml", "--config=c.yaml", "--x.y", "-1", "--z=", "--flag", "--w", "1"]
    )
    assert arguments.files == [Path("a.yaml"), Path("b.yaml"), Path("c.yaml")]
    assert arguments.options == [("x.y", "-1"), ("z", ""), ("flag", "true"), ("w", "1")]
    assert not arguments.help
    assert read_arguments(["--help"]).help
    assert read_arguments(["--print_config"]).print_config
    assert read_arguments(["--model.help", "a.B"]).class_help == ("model", "a.B")


@pytest.mark.parametrize("words", [["stray"], ["--config"], ["--"], ["--x", "1", "2"]])
def test_words_that_belong_nowhere(words: list[str]) -> None:
    with pytest.raises(CompositionError):
        read_arguments(words)


def test_one_option_may_stand_without_its_name() -> None:
    for words in (["a red boat", "--x", "1"], ["--config", "a.yaml", "a red boat"], ["--x=1", "a red boat"]):
        assert ("prompt", "a red boat") in read_arguments(words, "prompt").options
    for words in (["a", "b"], ["--prompt", "a", "b"], ["-x"], ["--"]):
        with pytest.raises(CompositionError, match="unexpected argument"):
            read_arguments(words, "prompt")


@given(trees, trees)
def test_merge_takes_the_later_leaf(base: Any, over: Any) -> None:
    merged = merge(base, over)
    for path, value in leaves(over).items():
        node = merged
        for key in path:
            node = node[key]
        assert node == value
    if isinstance(base, dict) and isinstance(over, dict):
        assert set(merged) == set(base) | set(over)


def test_files_then_options_then_interpolations(tmp_path: Path) -> None:
    files = write(
        tmp_path, {"root": "runs/a", "folder": "${root}/x", "list": [1, 2], "n": 1}, {"root": "runs/b", "list": [3]}
    )
    assert compose(files) == {"root": "runs/b", "folder": "runs/b/x", "list": [3], "n": 1}
    assert compose(files, [("root", "runs/c")])["folder"] == "runs/c/x"


def test_scientific_notation_is_a_number_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lr: 1e-4\n")
    assert compose([file]) == {"lr": 1e-4}


def test_another_class_keeps_nothing_of_the_earlier_arguments() -> None:
    base = {"loss": {"class_path": "a.A", "init_args": {"x": 1}}}
    same = merge(base, {"loss": {"class_path": "a.A", "init_args": {"y": 2}}})
    other = merge(base, {"loss": {"class_path": "a.B", "init_args": {"y": 2}}})
    assert same["loss"]["init_args"] == {"x": 1, "y": 2}
    assert other["loss"]["init_args"] == {"y": 2}


def test_options_reach_into_components(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        {
            "model": {"class_path": "a.A", "init_args": {"losses": {"l1": {"class_path": "b.B"}}}},
            "callbacks": {"save": {"class_path": "c.C", "init_args": {"n": 1}}},
        },
    )
    config = compose(
        files,
        [
            ("model.lr", "1e-4"),
            ("model.losses.l1.weight", "2"),
            ("callbacks.save.n", "3"),
            ("callbacks.new", "d.D"),
            ("callbacks.new.k", "v"),
            ("model.inner", "{x: 1, y: [2]}"),
        ],
    )
    init_args = config["model"]["init_args"]
    assert init_args["lr"] == "1e-4"  # text: the parameter's type reads it
    assert init_args["losses"]["l1"] == {"class_path": "b.B", "init_args": {"weight": "2"}}
    assert init_args["inner"] == {"x": 1, "y": [2]}
    assert config["callbacks"]["save"]["init_args"] == {"n": "3"}
    assert config["callbacks"]["new"] == {"class_path": "d.D", "init_args": {"k": "v"}}


def test_a_class_given_alone_replaces_the_component(tmp_path: Path) -> None:
    files = write(tmp_path, {"model": {"class_path": "a.A", "init_args": {"x": 1}}})
    assert compose(files, [("model", "a.B"), ("model.y", "2")])["model"] == {
        "class_path": "a.B",
        "init_args": {"y": "2"},
    }
    assert compose(files, [("model", "a.A")])["model"]["init_args"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "want"),
    [("auto", "auto"), ("ddp", "ddp"), ("a.B", {"class_path": "a.B"}), ("Sharded", {"class_path": "Sharded"})],
)
def test_one_of_the_trainers_own_names_replaces_a_component(tmp_path: Path, text: str, want: Any) -> None:
    files = write(tmp_path, {"trainer": {"strategy": {"class_path": "a.A", "init_args": {"x": 1}}}})
    assert compose(files, [("trainer.strategy", text)])["trainer"]["strategy"] == want


def test_null_switches_an_entry_off_and_a_later_file_on_again(tmp_path: Path) -> None:
    on = {"callbacks": {"ema": {"class_path": "a.A"}, "save": {"class_path": "b.B"}}}
    files = write(tmp_path, on, {"callbacks": {"ema": None}}, {"callbacks": {"ema": {"class_path": "a.A"}}})
    assert set(drop_nulls(compose(files[:2]), ["callbacks"])["callbacks"]) == {"save"}
    assert set(drop_nulls(compose(files), ["callbacks"])["callbacks"]) == {"ema", "save"}
    assert drop_nulls(compose(files, [("callbacks.save", "null")]), ["callbacks"])["callbacks"].keys() == {"ema"}
    assert drop_nulls({"callbacks": None}, ["callbacks", "loggers"]) == {"callbacks": {}}


def test_null_removes_a_loss_by_name_but_nulls_an_argument(tmp_path: Path) -> None:
    arguments = {"losses": {"l1": {"class_path": "a.A"}, "l2": {"class_path": "a.B"}}, "net": {"class_path": "b.B"}}
    model = {"model": {"class_path": "m.M", "init_args": arguments}}
    files = write(tmp_path, model, {"model": {"init_args": {"losses": {"l1": None}, "net": None}}})
    expected = {"losses": {"l2": {"class_path": "a.B"}}, "net": None}
    assert compose(files)["model"]["init_args"] == expected
    assert compose(files[:1], [("model.losses.l1", "null"), ("model.net", "null")])["model"]["init_args"] == expected
    assert compose([*files, files[0]])["model"]["init_args"] == arguments  # switched on again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c\n", r"a\.yaml:1: not valid YAML"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("- 1\n", "expected a mapping"),
        ("a: ${nope}\n", "a: Interpolation key 'nope' not found"),
        ("a: ${oc.env:LUVE_NOT_SET}\n", "a: Environment variable 'LUVE_NOT_SET' not found"),
        ("a:\n  b: ???\n", r"a\.b: required"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(CompositionError, match=message) as caught:
        compose([file])
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# only a comment\n")
    assert compose([file]) == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("n.x", "1"), "--n.x: n is 1 and has no keys inside"),
        (("a..b", "1"), "--a..b"),
        (("d", "{x"), "not valid"),
        (("output", "caf\udce9"), "--output: expected a text in UTF-8"),
    ],
)
def test_an_option_that_contradicts_the_structure(tmp_path: Path, option: tuple[str, str], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        compose(write(tmp_path, {"n": 1}), [option])


def test_dropping_nulls_needs_dictionaries() -> None:
    with pytest.raises(CompositionError, match="callbacks: expected a dictionary"):
        drop_nulls({"callbacks": [1]}, ["callbacks"])


def test_a_name_has_one_value() -> None:
    options = [("videos", "a=x"), ("videos", "b=y"), ("videos", "a=x"), ("seed", "1"), ("seed", "2")]
    assert dict(named_options(options, ["videos"])) == {"videos.a": "x", "videos.b": "y", "seed": "2"}
    with pytest.raises(CompositionError, match=r"--videos\.a: given twice, as 'x' and 'z'"):
        named_options([*options, ("videos", "a=z")], ["videos"])
