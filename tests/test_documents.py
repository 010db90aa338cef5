"""What README and the pages of the site say: their commands, paths, names and numbers are real, and the site builds."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from luve_lightning.ablations.results import SeedInterval, detectable
from luve_lightning.cli import verbs
from luve_lightning.cli.compose import compose, named_options, read_arguments
from luve_lightning.cli.keys import Keys
from luve_lightning.cli.run_verb import given_kind

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments/results/mini"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "data/mini/README.md")),
    REPOSITORY / "experiments/README.md",
    REPOSITORY / "comfyui/README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
ABLATIONS = (REPOSITORY / "docs/ablations.md").read_text(encoding="utf-8")
HOLDS = {"same": "yes", "opposite": "**no, opposite**", "none": "not told apart"}
NUMBER = re.compile(r"[-+]?\d[\d.]*")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# Options of other programs, and of ours that their source does not show.
FOREIGN = {"nproc-per-node", "help", "config", "print_config", "debug"}
# Words in capitals stand for what a reader puts there.
PLACEHOLDER = re.compile(r"\b(FILE|DIR|NAME|TABLE|PATH|VERB)\b|\.\.\.")


def relative(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def fenced(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


def shown(page: Path) -> list[str]:
    """The lines of code on a page: those of its blocks, joined where they go on, and its spans."""
    text = page.read_text(encoding="utf-8")
    lines = [line for body in fenced(page, "") for line in body.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in [*lines, *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]]


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words after a program's name, for each line that runs it."""
    for line in shown(page):
        words = re.split(rf"(?:^|[\s/(])(?:{program}) (?=\S)", line)
        if len(words) > 1:
            # Process substitution and redirection are bash's, as is what a comment says.
            yield shlex.split(re.split(r"\s[<>]", words[-1])[0].rstrip(")"), comments=True)


def options(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if re.match(r"--[a-z]", word)]


def known(verb: str, option: str, kind: str = "") -> bool:
    """Whether a verb has an option, by what the source shows; keys inside a component are its class's affair."""
    if kind and known(kind, option):  # whose options it skips
        return True
    keys = Keys(verb, kind)
    first, _, rest = option.removesuffix(".help").partition(".")
    if first == "trainer" and keys.trainer is not None:
        return not rest or rest.partition(".")[0] in keys.trainer.parameters
    parameter = keys.root.get(first)
    inside = parameter.fields() if parameter is not None and rest else None
    return first in FOREIGN or (parameter is not None and (inside is None or inside.get(rest) is not None))


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Dead links and anchors, pages outside of the navigation and names that the reference lacks are warnings.

    Two things that warn of nothing and take half of the time are left out: the index of the search, and ruff, which
    would be started for each of 900 signatures.
    """
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    site["plugins"].remove("search")
    python = site["plugins"][0]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(REPOSITORY)]
    python["options"]["separate_signature"] = False
    site |= {"docs_dir": str(REPOSITORY / "docs"), "hooks": [str(REPOSITORY / hook) for hook in site["hooks"]]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(site), encoding="utf-8")
    made = tmp_path / "site"
    options = ["--config-file", str(tmp_path / "mkdocs.yml"), "--strict", "--quiet", "--site-dir", str(made)]
    command = [sys.executable, "-m", "mkdocs", "build", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (made / "api/functional.html").read_text(encoding="utf-8")
    assert 'id="luve_lightning.functional.patches.frechet_distance"' in reference
    assert "docs/training.md" not in (made / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_in_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_luve_command_exists(page: Path) -> None:
    firsts = {verb.split()[0] for verb in verbs() if " " in verb}
    for words in commands(page, "luve|-m luve_lightning"):
        if words[0] == "help" or not re.fullmatch(r"[a-z-]+", words[0]):
            continue
        verb = " ".join(words[:2]) if words[0] in firsts and words[1:] else words[0]
        if verb in firsts:
            continue
        assert verb in verbs(), words
        arguments = read_arguments(words[len(verb.split()) :], verbs()[verb].positional)
        given = named_options(arguments.options, verbs()[verb].named)
        whole = not any(PLACEHOLDER.search(str(file)) for file in arguments.files)
        files = [REPOSITORY / file for file in arguments.files if whole]
        kind = given_kind(verb, files, given)
        for option in options(words):
            assert PLACEHOLDER.search(option) or known(verb, option, kind), f"luve {verb} has no --{option}"
        if files:
            keys = Keys(verb, kind)
            composed = compose(files, given, keys)
            unknown = [leaf.key for leaf in keys.leaves(composed) if leaf.known is not None]
            if reads := kind or verbs()[verb].reads:  # that verb's keys are skipped
                unknown = [key for key in unknown if Keys(reads).root.get(key.partition(".")[0]) is None]
            assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_option_shown_by_itself_is_some_verbs(page: Path) -> None:
    for span in shown(page):
        if span.startswith("--"):
            for option in options(span.split()):
                assert any(known(verb, option) for verb in verbs()), option


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_make_target_and_variable_exists(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE) for name in line.split()}
    variables = set(re.findall(r"^(\w+) *\?=", makefile, re.MULTILINE))
    for words in commands(page, "make"):
        for word in words:
            name, equals, value = word.partition("=")
            assert name in (variables if equals else targets), words
            if name == "CONFIG" and not PLACEHOLDER.search(value):
                assert (REPOSITORY / value).is_file(), value


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_path_shown_exists(page: Path) -> None:
    """Or is made by a command: git ignores it then."""
    roots = "data|docs|experiments|luve_lightning|notebooks|tests|tools"
    for path in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./*-]+)", "\n".join(shown(page))):
        if PLACEHOLDER.search(path) or list(REPOSITORY.glob(path.rstrip("."))):
            continue
        # As a folder, too: a pattern that ends in a slash is of folders, and in a fresh checkout there is none yet.
        words = ["git", "check-ignore", path, f"{path}/"]
        ignored = subprocess.run(words, cwd=REPOSITORY, capture_output=True, check=False)
        assert ignored.returncode == 0, path


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_name_of_the_package_shown_exists(page: Path) -> None:
    names = [tuple(name.rsplit(".", 1)) for name in re.findall(r"\bluve_lightning\.[\w.]+\w", "\n".join(shown(page)))]
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("luve_lightning"):
                names += [(str(node.module), alias.name) for alias in node.names]
    for module, name in names:
        if name != "NewLoss":
            parent = importlib.import_module(module)
            assert hasattr(parent, name) or importlib.import_module(f"{module}.{name}"), f"{module}.{name}"


def results(table: str) -> dict[tuple[str, str], dict[str, str]]:
    with (RESULTS / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return {(line["title"], line["metric"]): line for line in csv.DictReader(file)}


def shown_rows() -> dict[str, list[str]]:
    section = ABLATIONS.split("### The experts and the upsamplers")[1].split("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell)]


@pytest.mark.parametrize("table", ["experts", "upsampling"])
def test_every_row_of_the_results_is_shown(table: str) -> None:
    lines, rows = results(table), shown_rows()
    shown = 0
    for title in {title for title, _ in lines}:
        measured, spectral = (lines[title, metric] for metric in ("fd_patch_vae", "spectral_distance"))
        if not measured["direction"]:
            continue  # the reference row, which is shown with the table's name
        for cell, line in zip(rows[title], (measured, spectral), strict=False):
            keys = ("difference", "difference_low", "difference_high")
            assert numbers(cell) == pytest.approx([float(line[key]) for key in keys], rel=6e-3)
        assert numbers(rows[title][2]) == [float(measured["paper_difference"])]
        assert rows[title][3] == HOLDS[measured["direction"]]
        difference = SeedInterval(*(float(measured[key]) for key in keys), int(measured["seeds"]))
        assert numbers(rows[title][4]) == pytest.approx([detectable(difference)], rel=6e-3)
        shown += 1
    assert shown == {"experts": 7, "upsampling": 2}[table]


@pytest.mark.parametrize(
    ("table", "named", "row"),
    [("experts", "**Table 6: full cascade**", "full"), ("upsampling", "**Table 5: VLUer**", "VLUer")],
)
def test_the_row_that_the_others_are_compared_with(table: str, named: str, row: str) -> None:
    lines, cells = results(table), shown_rows()[named]
    for cell, metric in zip(cells, ("fd_patch_vae", "spectral_distance"), strict=False):
        assert numbers(cell) == pytest.approx([float(lines[row, metric]["mean"])], rel=6e-3)
    assert numbers(cells[2]) == [float(lines[row, "fd_patch_vae"]["paper"])]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_where_they_are_from(path: Path) -> None:
    about = json.loads(path.read_text(encoding="utf-8"))
    assert "mini world" in about["world"]
    assert len(about["seeds"]) >= 3
    assert not about["failed"]
    assert not about["missing"]
    assert re.fullmatch(r"[0-9a-f]{40}", about["revision"])
    assert about["command"].startswith(f"luve ablate {path.stem}")
    for key in ("device", "date", "packages", "settings"):
        assert about[key]
