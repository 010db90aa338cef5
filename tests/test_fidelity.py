"""docs/fidelity.md: no cell is empty, and what it says of our configurations is what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from luve_lightning.config_files import SWITCHED_OFF, merge, read_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/fidelity.md"
COLUMNS = ["choice", "paper", "code", "ours", "why"]
# The words that may stand where a source has no answer; the page explains them above its first table.
WORDS = ["not said", "not seen", "not noted", "as the paper", "as the code"]
SPAN = re.compile(r"`([^`]+)`")


def rows(text: str) -> list[tuple[str, list[str]]]:
    """Every line of a table that is no ruler, with the heading above it."""
    found, heading = [], ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not re.fullmatch(r"[| -]+", line):
            found.append((heading, [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]))
    return found


def offences(text: str) -> list[str]:
    """Rows with another number of cells, and empty cells; a dash is empty, too."""
    wrong = [f"{heading}: {cells}: {len(cells)} cells" for heading, cells in rows(text) if len(cells) != len(COLUMNS)]
    return wrong + [
        f"{heading}: {cells[0] or '(no name)'}: empty {column}"
        for heading, cells in rows(text)
        for column, cell in zip(COLUMNS, cells, strict=False)
        if not re.search(r"\w", cell)
    ]


TEXT = PAGE.read_text(encoding="utf-8")
CHOICES = [(heading, cells) for heading, cells in rows(TEXT) if cells != COLUMNS]


def claims() -> list[tuple[str, str, str]]:
    """File, key and value of each setting of a configuration that the page shows."""
    found = []
    for _, cells in CHOICES:
        file = ""
        for span in SPAN.findall(cells[COLUMNS.index("ours")]):
            if span.startswith("experiments/"):
                file = span
            elif not span.startswith("-") and (setting := re.fullmatch(r"([\w.]+): (.+)", span)):
                found.append((file, setting[1], setting[2]))
    return found


def setting(file: str, key: str) -> Any:
    """A configuration's value, with what it extends; a missing key is the test's failure."""
    value: Any = read_config(REPOSITORY / file, merge=merge)
    for name in key.split("."):
        value = value[name]
    return None if value is SWITCHED_OFF else value


def test_no_cell_is_empty() -> None:
    assert len(CHOICES) >= 60
    assert sum(cells == COLUMNS for _, cells in rows(TEXT)) == len({heading for heading, _ in CHOICES})
    assert offences(TEXT) == []
    assert offences("# A\n| a | b | | d | e |\n| a | b | c | d |\n| a | - | c | d | e |\n") == [
        "A: ['a', 'b', 'c', 'd']: 4 cells",
        "A: a: empty code",
        "A: a: empty paper",
    ]


def test_every_choice_is_named_once_in_its_table() -> None:
    names = [(heading, cells[0]) for heading, cells in CHOICES]
    assert len(set(names)) == len(names)


def test_the_words_for_what_is_unknown_are_explained_first() -> None:
    before = TEXT.partition("\n| ")[0]
    for word in WORDS:
        assert f"**{word}**" in before
    for _, cells in CHOICES:
        for column in ("paper", "code"):
            cell = cells[COLUMNS.index(column)].lower()
            assert not re.search(r"\b(unknown|n/a|none given|unclear)\b", cell), cell


@pytest.mark.parametrize(("file", "key", "value"), claims(), ids=lambda part: str(part)[-60:])
def test_what_is_said_of_a_configuration_is_in_it(file: str, key: str, value: str) -> None:
    assert file.endswith(".yaml"), f"{key}: no configuration is named before it"
    assert setting(file, key) == yaml.safe_load(value)


def test_most_choices_name_their_key() -> None:
    assert len(claims()) >= 60
