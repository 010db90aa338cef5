from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from luve_lightning.cli.compose import compose, escaped, read_arguments
from luve_lightning.cli.keys import Keys, Text
from luve_lightning.cli.parsing import check, dump
from luve_lightning.config_files import CompositionError, read_config

REPOSITORY = Path(__file__).resolve().parents[2]
NASTY = [
    "a sign that says ${height} .", "${oc.env:HOME}", "${", "\\${a}", "\\\\${a}", "{a cat|a dog}", "{a: b}",
    "null", "~", "~/x", "5", "1e3", "true", "???", "- a", "- a\n- b", "*x", "&x", "#x", "a #b", "!x", "--a cat",
    "--a", "-x", "--", "=", "'", '"', "a\nb", " a ", "", "[a", "a: b: c", "😀", "\u2028", "%YAML", "@x", "`x`", "\\",
]  # fmt: skip
# Any text that can stand on a command line.
texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))


def verb(text: str, maybe: str | None = None, prompt: str | None = None, height: int = 8) -> None:
    """Takes texts."""


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, print_config=None, parser_mode="yaml")
    parser.add_function_arguments(verb, as_group=False)
    return parser


class OwnKeys(Keys):
    """The keys of the function above."""

    def __init__(self) -> None:
        from luve_lightning.cli.signatures import function_signature

        self.training, self.trainer = False, None
        found = function_signature(__name__, "verb")
        assert found is not None
        self.root = found


def read(parser: ArgumentParser, files: list[Path], options: list[tuple[str, str]]) -> dict[str, Any]:
    return check(parser, compose(files, options, OwnKeys())).as_dict()


@pytest.mark.slow
@settings(deadline=None)
@given(text=texts)
@example(text="null")
def test_a_text_on_the_command_line_is_literal(parser: ArgumentParser, text: str) -> None:
    arguments = read_arguments([f"--text={text}", f"--maybe={text}", f"--prompt={text}"])
    found = read(parser, arguments.files, arguments.options)
    assert found["text"] == text
    assert found["prompt"] == text
    assert found["maybe"] == (None if text == "null" else text)
    assert {type(found[key]) for key in ("text", "prompt")} == {str}


@pytest.mark.slow
@settings(deadline=None)
@given(text=texts)
def test_what_is_printed_of_a_text_is_read_back(
    parser: ArgumentParser, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = [("text", text), ("prompt", text)]
    checked = check(parser, compose([], options, OwnKeys()))
    file = tmp_path_factory.mktemp("printed") / "config.yaml"
    file.write_text(dump(parser, checked), encoding="utf-8")
    found = read(parser, [file], [])
    assert (found["text"], found["prompt"]) == (text, text)


@settings(deadline=None)
@given(text=texts)
def test_escaping_is_undone_by_composition(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("escaped") / "config.yaml"
    content = {"a": escaped(text), "b": {"c": [escaped(text)]}}
    file.write_text(yaml.safe_dump(content, default_style='"'))
    assert compose([file]) == {"a": text, "b": {"c": [text]}}


def test_other_values_of_the_command_line_and_files_interpolate(parser: ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("height: 32\ntext: ${maybe} of ${height}\nmaybe: '#x'\n")
    found = read(parser, [file], [("prompt", "${height}")])
    assert found == {"height": 32, "text": "#x of 32", "maybe": "#x", "prompt": "${height}"}
    found = read(parser, [file], [("height", "${oc.decode:'64'}"), ("maybe", "${height}")])
    assert found["height"] == 64
    assert found["text"] == "${height} of 64"  # a literal text stays one where another value quotes it


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["--prompt", "--a cat"], "--a cat"),
        (["--prompt=--a"], "--a"),
        (["--", "--a"], "--a"),
        (["- a cat"], "- a cat"),
        (["--height", "8", "--", "--height 3"], "--height 3"),
        (["a=b"], "a=b"),
    ],
)
def test_a_text_that_looks_like_an_option(words: list[str], prompt: str) -> None:
    assert ("prompt", prompt) in read_arguments(words, "prompt").options


@pytest.mark.parametrize("words", [["--prompt", "--steps", "5"], ["--output"], ["--prompt", "--", "x"]])
def test_a_text_or_path_needs_a_value(words: list[str]) -> None:
    arguments = read_arguments(words, "backbone")
    with pytest.raises(CompositionError, match=f"{words[0]}: expected a value; one that begins with --"):
        compose([], arguments.options, Keys("generate"))
    assert compose([], read_arguments(["--cascade"]).options, Keys("generate")) == {"cascade": "true"}


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(CompositionError, match="--prompt: expected a text in UTF-8"):
        compose([], [("prompt", "a \udcff")], Keys("generate"))
    with pytest.raises(CompositionError, match="unexpected argument '--steps 5'"):
        read_arguments(["--steps 5"], "prompt")


def test_home_is_expanded_in_every_path_and_in_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    options = [
        ("trainer.default_root_dir", "~/run"), ("ckpt_path", "~/a.ckpt"), ("model.backbone", "~/wan"),
        ("data.index", "~/clips.csv"), ("data.store", "~/store"), ("loggers.wandb.notes", "~/x ${y}"),
        ("loggers.wandb.name", "~me"), ("callbacks.comparison.extra", "{theirs: ~/theirs}"),
    ]  # fmt: skip
    config = compose([REPOSITORY / "experiments/vluer/mini.yaml"], options, Keys("fit"))
    assert config["trainer"]["default_root_dir"] == "/home/me/run"
    assert config["ckpt_path"] == "/home/me/a.ckpt"
    assert config["model"]["init_args"]["backbone"] == "/home/me/wan"
    assert config["data"]["init_args"]["index"] == "/home/me/clips.csv"
    assert config["data"]["init_args"]["store"] == "/home/me/store"
    assert config["callbacks"]["export"]["init_args"]["output"] == "/home/me/run/vluer"
    assert config["loggers"]["csv"]["init_args"]["save_dir"] == "/home/me/run"
    assert config["callbacks"]["comparison"]["init_args"]["extra"]["theirs"] == "/home/me/theirs"
    wandb = config["loggers"]["wandb"]["init_args"]
    assert (wandb["notes"], wandb["name"]) == ("~/x ${y}", "~me")
    file = tmp_path / "g.yaml"
    file.write_text("output: ~/out\nprompt: ~/not a path\nexperts: {lfe: ~/lfe, hfe: null}\nlatents: '#x'\n")
    config = compose([file], [("videos", "~/v")], Keys("generate"))
    assert config["output"] == "/home/me/out"
    assert config["prompt"] == "~/not a path"
    assert config["experts"] == {"lfe": "/home/me/lfe", "hfe": None}
    assert config["latents"] == "./#x"  # YAML would read a comment


@pytest.mark.parametrize(
    ("path", "message"), [("", "output: expected a path, got an empty text"), ("~nobody-here/x", "no home")]
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose([], [("output", path)], Keys("generate"))


def test_no_key_of_the_experiments_is_called_unknown() -> None:
    training = dict.fromkeys(("vluer", "experts", "mini"), "fit")
    own = {"lfe": "fit", "vluer": "fit"}  # a folder of several verbs, whose files are named after the others
    files = sorted(REPOSITORY.glob("experiments/*/*.yaml"))
    files = [file for file in files if file.parent.name not in ("ablations", "base")]  # of several verbs
    assert len(files) > 30
    for file in files:
        verb = own.get(file.stem, file.stem) if file.parent.name == "own" else file.parent.name
        if verb == "rivals":  # of several verbs, too: each file's header has its command
            [verb] = set(
                re.findall(rf"^#   luve (\w+) .*--config experiments/rivals/{file.name}", file.read_text(), re.M)
            )
        keys = Keys(training.get(verb, verb))
        assert [leaf.key for leaf in keys.leaves(read_config(file)) if leaf.known] == [], file


def test_unknown_and_missing_keys_are_found_in_the_source() -> None:
    keys = Keys("fit")
    options = [("model.lrr", "1"), ("trainer.max_step", "3")]
    config = compose([REPOSITORY / "experiments/vluer/mini.yaml"], options, keys)
    assert [leaf.key for leaf in keys.leaves(config) if leaf.known] == ["trainer.max_step", "model.init_args.lrr"]
    assert keys.missing({"model": "x"}) == ["data"]
    assert keys.elsewhere("max_steps", config) == ["trainer.max_steps"]
    assert keys.elsewhere("batch_sizes", config) == ["data.batch_size"]
    assert Keys("generate").missing({"height": 1}) == ["backbone", "output", "width"]
    assert isinstance(compose([], [("prompt", "x")], Keys("generate"))["prompt"], Text)


def test_a_component_switched_off_in_a_file_has_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "off.yaml"
    file.write_text("callbacks: {strips: null}\n")
    files = [REPOSITORY / "experiments/vluer/mini.yaml", file]
    message = "--callbacks.strips.every_n_steps: callbacks.strips is disabled by null in a file"
    with pytest.raises(CompositionError, match=message):
        compose(files, [("callbacks.strips.every_n_steps", "3")], Keys("fit"))


def test_a_file_stands_for_a_group_of_keys(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("scale: 3\n")
    file = tmp_path / "guidance.yaml"
    file.write_text("extends: base.yaml\nlow: ${seed}\n")
    options = [("guidance", str(file)), ("seed", "1")]
    assert compose([], options, Keys("generate"))["guidance"] == {"scale": 3, "low": "1"}
    with pytest.raises(CompositionError, match=r"^--guidance: no such file: .*nosuch\.yaml"):
        compose([], [("guidance", str(tmp_path / "nosuch.yaml"))], Keys("generate"))
    # A text and a path that end so are no groups.
    options = [("prompt", str(file)), ("output", str(file))]
    assert compose([], options, Keys("generate")) == {"prompt": str(file), "output": str(file)}
