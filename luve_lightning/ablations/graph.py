"""From a table to the commands that make it: the stages, their order, and what each result depends on.

A stage's result belongs to the hash of everything it depends on: its verb, its composed configuration, the
contents of the files named there, and the hashes of the stages whose results it uses. Rows, seeds and tables that
agree on all of these share it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luve_lightning.ablations.table import ROW, StageSpec, Table
from luve_lightning.data.hashes import FileHashes
from luve_lightning.files import listing_digest, text_digest

_MODEL_FILES = ("model_index.json", "config.json", "adapter_config.json")
# A folder of more files is a store of clips or latents. Latent and text stores name entries by what they depend
# on, so the same configuration never reads other content.
_REMEMBERED = ("file_hashes.jsonl", "clip_readings.jsonl")
_FEW = 32


class Contents:
    """Identities of what paths lead to, each looked up once.

    Args:
        root: folder of the cache of file hashes.
    """

    def __init__(self, root: Path) -> None:
        self.hashes = FileHashes(root)
        self._known: dict[str, str | None] = {}

    def named_in(self, config: Any) -> dict[str, str]:
        """Identities of everything that a configuration names, by the text that names it.

        Models count by their weights and configuration, files and small folders by their bytes. Large folders and
        missing paths do not count.
        """
        texts = sorted(set(_texts(config)))
        return {text: found for text in texts if (found := self.identity(text)) is not None}

    def identity(self, text: str) -> str | None:
        """The identity of what a path leads to; None where it does not count."""
        if text not in self._known:
            self._known[text] = self._look(text)
        return self._known[text]

    def _look(self, text: str) -> str | None:
        if len(text) > 1000 or "\n" in text or not ("/" in text or Path(text).suffix):
            return None  # a word, not a path
        path = Path(text)
        try:
            if path.is_file():
                return f"sha256:{self.hashes.digest(path)}"
            if not path.is_dir():
                return None
            if _is_model(path):
                # Imported here, because it brings every pipeline with it: seconds.
                from luve_lightning.cascade.pipeline_files import model_identity

                return model_identity(path, self.hashes)
            return self._small_folder(path)
        except OSError:  # a folder that is being written, or may not be read: the stage itself reports it
            return None

    def _small_folder(self, folder: Path) -> str | None:
        # Caches of file hashes are no content, and grow as files are looked at.
        content = (path for path in folder.rglob("*") if path.name not in _REMEMBERED and path.is_file())
        files = sorted(itertools.islice(content, _FEW + 1))
        if not 0 < len(files) <= _FEW:
            return None
        named = ((path.relative_to(folder).as_posix(), self.hashes.digest(path)) for path in files)
        return f"sha256:{listing_digest(named)}"


def _is_model(folder: Path) -> bool:
    places = (folder, *(path for path in folder.iterdir() if path.is_dir()))
    return any((place / name).is_file() for place in places for name in _MODEL_FILES)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _texts(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


Compose = Callable[[Sequence[Path], Sequence[tuple[str, str]]], dict[str, Any]]
"""Composes configuration files and options into one mapping, as the command line does."""

Use = tuple[str, int]
"""A row and a seed."""

_VERSION = 1  # version of the hashes; raise it when the same configuration gives other results
_SHOWN = 12
_PROMPTS = ("prompt", "negative_prompt")  # texts on a command line, whatever they look like
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")


@dataclass
class AblationStage:
    """One command to run, once.

    Attributes:
        name: name of the stage.
        digest: sha256 of everything its result depends on, 64 hex digits.
        folder: folder of its result.
        words: words of its command, after `luve`.
        needs: digests of the stages whose results it uses.
        uses: rows and seeds that it serves.
        gathers: whether it serves all rows of a seed at once.
        place: that of the first table that needs it, among tables that run together.
    """

    name: str
    digest: str
    folder: Path
    words: tuple[str, ...]
    needs: tuple[str, ...]
    gathers: bool
    uses: set[Use] = field(default_factory=set)
    place: int = 0

    @property
    def label(self) -> str:
        """Its name and the beginning of its hash."""
        return f"{self.name}-{self.digest[:_SHOWN]}"


@dataclass(frozen=True)
class Plan:
    """What to run for some rows and seeds.

    Attributes:
        stages: stages by digest, each after those that it needs.
        goals: digest of the stage from which a (row, seed, stage name) reads its numbers.
    """

    stages: Mapping[str, AblationStage]
    goals: Mapping[tuple[str, int, str], str]

    def levels(self) -> list[list[AblationStage]]:
        """Stages that can run at the same time: each level needs only stages of earlier levels."""
        level: dict[str, int] = {}
        found: dict[int, list[AblationStage]] = {}
        for digest, stage in self.stages.items():
            level[digest] = max((level[need] + 1 for need in stage.needs), default=0)
            found.setdefault(level[digest], []).append(stage)
        return [found[depth] for depth in sorted(found)]


class AblationPlanner:
    """Finds the stages of a table.

    Args:
        root: folder of the stages' results; they share its `cache/`.
    """

    def __init__(self, table: Table, root: Path, compose: Compose, contents: Contents) -> None:
        self.table, self.root, self.compose, self.contents = table, root, compose, contents
        self._digests: dict[str, str] = {}

    def plan(self, rows: Mapping[int, Sequence[str]]) -> Plan:
        """The stages for some rows of each seed; stages that no metric needs are left out.

        Raises:
            ValueError: a stage that depends on itself, an unknown placeholder, a configuration that cannot be
                composed.
        """
        stages: dict[str, AblationStage] = {}
        goals: dict[tuple[str, int, str], str] = {}
        wanted = list(dict.fromkeys(metric.stage for metric in self.table.metrics.values()))
        for seed, names in rows.items():
            graph = _SeedGraph(self, seed, [name for name in self.table.rows if name in names], stages)
            for row in graph.rows:
                for stage in wanted:
                    goals[row, seed, stage] = graph.stage(row, stage).digest
        return Plan(stages, goals)

    def before_gathering(self, row: str, seed: int) -> list[AblationStage]:
        """A row and seed's own stages: all but those that serve several rows at once."""
        plan = self.plan({seed: [row]})
        gathering = {digest for digest, stage in plan.stages.items() if stage.gathers}
        for digest, stage in plan.stages.items():  # whatever uses them comes after them, too
            if gathering & set(stage.needs):
                gathering.add(digest)
        return [stage for digest, stage in plan.stages.items() if digest not in gathering]

    def digest(self, verb: str, config: Sequence[str], options: Sequence[tuple[str, str]]) -> str:
        """The hash of a command whose options name other stages by their hashes."""
        key = json.dumps([verb, list(config), list(options)])
        if key not in self._digests:
            composed = self.compose([Path(file) for file in config], options)
            contents = self.contents.named_in(composed)
            about = {"version": _VERSION, "verb": verb, "config": composed, "contents": contents}
            text = json.dumps(about, sort_keys=True, ensure_ascii=False, default=str)
            self._digests[key] = text_digest(text)
        return self._digests[key]


class _SeedGraph:
    """The stages of one seed."""

    def __init__(self, planner: AblationPlanner, seed: int, rows: list[str], stages: dict[str, AblationStage]) -> None:
        self.planner, self.seed, self.rows, self.stages = planner, seed, rows, stages
        self._known: dict[tuple[str, str | None], AblationStage] = {}
        self._path: list[str] = []

    def stage(self, row: str, name: str) -> AblationStage:
        """A stage of a row, with everything it needs."""
        spec = self.planner.table.rows[row].stages[name]
        key = (name, None if spec.gathers else row)
        if key not in self._known:
            if name in self._path:
                raise ValueError(
                    f"row {row}: stages depend on each other in a circle: {', '.join([*self._path, name])}"
                )
            self._path.append(name)
            self._known[key] = self._make(row, spec)
            self._path.pop()
        stage = self._known[key]
        stage.uses.update((row, self.seed) for row in (self.rows if spec.gathers else [row]))
        return stage

    def _make(self, row: str, spec: StageSpec) -> AblationStage:
        needed: dict[str, AblationStage] = {}
        filled = []  # for each option: its key, its text, its row
        own: str | None
        for key, value in spec.options.items():
            if value is None and key in _PROMPTS:
                raise ValueError(
                    f"stages.{spec.name}.options.{key}: on a command line null is a word; give a file in `config` that "
                    f"says {key}: null"
                )
            for own in self.rows if ROW in key else [row]:
                given = self.planner.table.rows[own].stages[spec.name].options[key] if ROW in key else value
                filled.append((key.replace(ROW, own), as_text(given), own if ROW in key or not spec.gathers else None))
        described: list[tuple[str, str]] = []
        later: list[tuple[str, str, dict[str, str]]] = []
        for key, text, own in filled:
            folders: dict[str, str] = {}
            symbols: dict[str, str] = {}
            for word in _PLACEHOLDER.findall(text):
                symbols[word], folders[word] = self._replace(spec, key, word, own, needed)
            described.append((key, _fill(text, symbols)))
            later.append((key, text, folders))
        digest = self.planner.digest(spec.verb, spec.config, described)
        folder = self.planner.root / "stages" / f"{spec.name}-{digest[:_SHOWN]}"
        words = [spec.verb]
        for file in spec.config:
            words += ["--config", file]
        for key, text, folders in later:
            words += [f"--{key}", _fill(text, folders | {"out": str(folder)})]
        stage = AblationStage(spec.name, digest, folder, tuple(words), tuple(needed), spec.gathers)
        return self.stages.setdefault(digest, stage)

    def _replace(
        self, spec: StageSpec, key: str, word: str, row: str | None, needed: dict[str, AblationStage]
    ) -> tuple[str, str]:
        """A placeholder's replacement in the hash, and in the command."""
        where = f"stages.{spec.name}.options.{key}: {{{word}}}"
        if word == "seed":
            return str(self.seed), str(self.seed)
        if word == "out":
            return "@out", "{out}"
        if word == "cache":
            return "@cache", str(self.planner.root / "cache")
        stages = self.planner.table.rows[row or self.rows[0]].stages
        if word != "row" and word not in stages:
            raise ValueError(
                f"{where}: expected {{seed}}, {{out}}, {{cache}}, {{row}} or one of the stages {', '.join(stages)}"
            )
        if row is None and not (word in stages and stages[word].gathers):
            # A stage for all rows may use another stage once if that is the same in all rows.
            if word == "row" or len({self.stage(row, word).digest for row in self.rows}) > 1:
                raise ValueError(
                    f"{where}: differs between rows; the option's key must hold {ROW} to be given for each"
                )
            row = self.rows[0]
        if word == "row":
            assert row is not None
            return row, row
        stage = self.stage(row or self.rows[0], word)
        needed[stage.digest] = stage
        return f"@{stage.digest}", str(stage.folder)


def as_text(value: Any) -> str:
    """An option's value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def without(rows: Mapping[int, Sequence[str]], lost: Collection[Use]) -> dict[int, list[str]]:
    """The rows of each seed without the lost ones."""
    return {seed: [row for row in names if (row, seed) not in lost] for seed, names in rows.items()}


def together(plans: Mapping[str, Plan]) -> Plan:
    """The plans of several tables, by name, as one: a stage that several share is there once.

    A row is called TABLE/ROW in it; `own_uses` finds one table's again.

    Raises:
        ValueError: two tables have the same stage under different names, and so in different folders.
    """
    stages: dict[str, AblationStage] = {}
    goals: dict[tuple[str, int, str], str] = {}
    for place, (table, plan) in enumerate(plans.items()):
        for digest, stage in plan.stages.items():
            known = stages.setdefault(digest, replace(stage, uses=set(), place=place))
            if known.folder != stage.folder:
                raise ValueError(f"{table}: {stage.label} is {known.label} in a table before it; run it by itself")
            known.uses.update((f"{table}/{row}", seed) for row, seed in stage.uses)
        goals |= {(f"{table}/{row}", seed, stage): digest for (row, seed, stage), digest in plan.goals.items()}
    return Plan(stages, goals)


def own_uses(table: str, uses: Collection[Use]) -> dict[Use, Use]:
    """Those of a plan of several tables that are a table's, by what they are called there."""
    start = f"{table}/"
    return {(row.removeprefix(start), seed): (row, seed) for row, seed in uses if row.startswith(start)}
