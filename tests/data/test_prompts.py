"""Prompt files: what they may say, and the line that is named when they say something else."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luve_lightning.data.prompts import PromptLine, check_distinct, read_negative_prompt, read_prompt_file, slug


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", '\ufeffa red boat\n\n  # a "quoted" one: {x} \r\nlast')
    lines = read_prompt_file(path)
    assert [line.prompt for line in lines] == ["a red boat", '# a "quoted" one: {x}', "last"]
    assert [line.where for line in lines] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert lines[0] == PromptLine("a red boat")


def test_json_lines_may_say_more(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a\u2028boat"},
        {"prompt": "b", "seed": 0, "height": 64, "width": 48, "num_frames": 5, "negative_prompt": "", "name": "x"},
    ]
    path = write(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert read_prompt_file(path) == [PromptLine("a\u2028boat"), PromptLine("b", "", "x", 0, 64, 48, 5)]


def test_ultravideos_csv_is_a_prompt_file(tiny_clips: Path) -> None:
    lines = read_prompt_file(tiny_clips / "clips.csv")
    assert len(lines) == 6
    assert {line.prompt for line in lines} == {"Coloured squares drift to the left."}
    assert lines[0].name == f"{0:040x}"
    assert lines[0].height is None


def test_a_csv_of_our_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'seed,prompt,other,name\n3,"two\nlines",?,\n,b,?,second\n')
    assert read_prompt_file(path) == [PromptLine("two\nlines", seed=3), PromptLine("b", name="second")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b",}\n', ":2: not JSON: "),
        ("a.jsonl", '{"prompt": "a"}\n\n["b"]\n', ":3: expected a JSON object"),
        ("a.jsonl", '{"seed": 1}', ":1: prompt: required, but not given"),
        ("a.jsonl", '{"prompt": "  "}', ":1: prompt: required, but not given"),
        ("a.jsonl", '{"prompt": "a", "sed": 1}', ":1: unknown key 'sed'; known: prompt, negative_prompt"),
        ("a.jsonl", '{"prompt": "a", "seed": 1.5}', ":1: seed: expected a whole number, got 1.5"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', ":1: seed: expected a whole number, got True"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', ":1: seed: expected a whole number from 0 to 2**63 - 1"),
        ("a.jsonl", '{"prompt": 3}', ":1: prompt: expected text, got 3"),
        ("a.jsonl", '{"prompt": "a", "name": "../x"}', ":1: name '../x': expected letters, digits"),
        ("a.jsonl", '{"prompt": "a", "name": ".hidden"}', ":1: name '.hidden': expected letters, digits"),
        ("a.jsonl", '{"prompt": "a", "name": "' + "河" * 80 + '"}', ":1: name '" + "河" * 12 + "'...: 240 bytes"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', ":1: not JSON: 'prompt' is given twice"),
        ("a.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", ":1: not JSON: "),
        ("a.jsonl", "[" * 100_000, ":1: not JSON: "),
        ("a.jsonl", '{"prompt": "a red \\ud800 boat"}', ":1: prompt: no text: a broken character after 'a red '"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', ":1: prompt: a NUL character after 'a'"),
        ("a.csv", 'prompt,seed\n"a red boat,3\nb,4\n', ":2: not CSV: unexpected end of data"),
        ("a.csv", "prompt\na red boat, sails\n", ":2: 1 columns, but 2 cells; put a text with commas in"),
        ("a.csv", "prompt,seed,prompt\na,1,b\n", ":1: the column prompt is there 2 times"),
        ("a.csv", "prompt\n" + "a" * 200_000, ":2: not CSV: field larger than"),
        ("a.csv", "prompt,seed\na,one\n", ":2: seed: expected a whole number, got 'one'"),
        ("a.csv", "prompt, Seed\na,1\n", ":1: unknown column ' Seed'; did you mean 'seed'?"),
        ("a.csv", "prompt,Negative prompt\na,b\n", ":1: unknown column 'Negative prompt'; did you mean 'negative"),
        ("a.txt", "a\n\u200b\u202e \n", ":2: prompt: expected some words, got invisible characters only: '\\u200b"),
        ("a.csv", "words\na\n", ":1: expected a column prompt or Summarized Description"),
        ("a.txt", "\n \n", ": no prompt in it"),
        ("a.yaml", "a", ": expected a .txt, .jsonl or .csv file"),
    ],
)
def test_what_is_wrong_is_said_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match="^" + re.escape(f"prompts: {path}{message}")):
        read_prompt_file(path)


# What `str.splitlines` splits at besides line ends.
SEPARATORS = "\u2028\u2029\u0085\v\f\x1c\x1d\x1e"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_only(tmp_path: Path, end: str) -> None:
    prompts = [f"a red boat .{separator}the camera pans ." for separator in SEPARATORS]
    text = write_bytes(tmp_path / "a.txt", end.join(["", *prompts, ""]))
    assert [line.prompt for line in read_prompt_file(text)] == prompts
    table = write_bytes(tmp_path / "a.csv", end.join(["prompt,seed", *(f"{prompt},3" for prompt in prompts)]))
    assert read_prompt_file(table) == [PromptLine(prompt, seed=3) for prompt in prompts]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert read_prompt_file(write_bytes(tmp_path / "a.jsonl", end.join(rows))) == list(map(PromptLine, prompts))


def test_a_cell_keeps_its_line_ends(tmp_path: Path) -> None:
    table = write_bytes(tmp_path / "a.csv", 'prompt\r\n"one\r\ntwo\u2028three\rfour"\r\n')
    assert read_prompt_file(table) == [PromptLine("one\r\ntwo\u2028three\rfour")]


@pytest.mark.parametrize("name", ["河" * 79, "नमस्ते", "é", unicodedata.normalize("NFD", "é"), "a (1)", "_x"])
def test_names_of_any_script(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a", "name": name}))
    (line,) = read_prompt_file(path)
    assert line.name == name
    for suffix in (".mp4", ".json", ".jpg"):
        (tmp_path / f"{name}{suffix}").touch()


def write_bytes(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompt_file(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompt_file(tmp_path / "b.txt")


@pytest.mark.parametrize(
    "text", ["blurry", "色调艳丽, 过曝, 静态", "null", "${oc.env:HOME} <b>{x}</b> # no comment", "- a\n\nb, \u2028c"]
)
def test_a_negative_prompts_file_is_its_text(tmp_path: Path, text: str) -> None:
    assert read_negative_prompt(write(tmp_path, "any name", f"\ufeff \n{text}\r\n")) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected some words, got invisible characters only: ''"),
        (" \u200b\n".encode(), "expected some words, got invisible characters only"),
        (b"caf\xe9", "not UTF-8: unexpected end of data at byte 3"),
        (b"a\0b", "a NUL character after 'a'"),
        (b"x" * 70_000, "expected a short text, this file has 70,000 bytes"),
    ],
)
def test_a_negative_prompts_file_that_is_none_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "n.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"negative_prompt_file: {path}: {message}")) as error:
        read_negative_prompt(path)
    assert "\n" not in str(error.value)


def test_a_negative_prompts_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"negative_prompt_file: .*gone.txt: no such file"):
        read_negative_prompt(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="expected a text file, this is a folder"):
        read_negative_prompt(tmp_path)


def test_the_negative_prompt_of_the_repository_is_short_english() -> None:
    text = read_negative_prompt(Path(__file__).parents[2] / "data" / "prompts" / "not-wanted.txt")
    assert text.isascii()
    assert 20 < len(text.split()) < 100


def test_names_can_be_read_and_tell_videos_apart() -> None:
    line = PromptLine("A red boat, sails!", where="x:1")
    name = line.video_name(7)
    assert re.fullmatch(r"a-red-boat-sails-seed7-[0-9a-f]{8}", name)
    assert PromptLine("A red boat, sails!", where="y:9").video_name(7) == name
    others = [
        PromptLine("A red boat sails!"),
        PromptLine("A red boat, sails!", height=64),
        PromptLine("A red boat, sails!", negative_prompt="blur"),
    ]
    assert len({name, *(other.video_name(7) for other in others), line.video_name(8)}) == 5
    assert PromptLine("a", name="my video").video_name(7) == "my video"


@given(st.text(max_size=200))
def test_a_slug_is_a_file_name(text: str) -> None:
    made = slug(text)
    assert 1 <= len(made) <= 48
    assert not re.search(r"[\s/\\.:*?\"<>|\x00]", made)
    assert len(made.encode()) < 200
    assert slug(made) == made


def test_a_slug_is_cut_between_words() -> None:
    assert slug("one two three", 9) == "one-two"
    assert slug("one two three", 7) == "one-two"
    assert slug("enormous", 4) == "enor"
    assert slug("咖啡 Été!") == "咖啡-été"
    assert slug("🙂") == "video"


def test_one_file_cannot_be_two_videos() -> None:
    check_distinct([("a", "f:1"), ("b", "f:2")])
    with pytest.raises(ValueError, match="prompts: f:2: é is the video of f:1 already"):
        check_distinct([(unicodedata.normalize("NFD", "é"), "f:1"), ("é", "f:2")])
    with pytest.raises(ValueError, match=r"prompts: f:3: A is the video of f:1 already"):
        check_distinct([("a", "f:1"), ("b", "f:2"), ("A", "f:3")])
