"""The `luve` command: its verbs, found in the modules of this folder, each imported only when needed."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from luve_lightning.machine import PACKAGE_ROOT

# Headings of `luve --help`.
_GROUPS = ("Data", "Training", "Generation", "Measurement", "Tables", "Shell")
RUNS = ("experiments/vluer/mini.yaml", "experiments/experts/mini-adaptation.yaml")


@dataclass(frozen=True)
class Verb:
    """One verb of the command line, as its module states it under its name in `VERBS`.

    Its options are the parameters of the module's function of that name (`study build` is `study_build`).

    Attributes:
        group: Heading in `luve --help`.
        summary: What it does, in one line.
        named: Options that are dictionaries by name and may be given as `--option NAME=VALUE`, repeated.
        positional: Options whose values may be given without `--option` before them, in order, separated by spaces;
            `paths...` at the end takes all further words as a list.
        examples: Configurations in the repository to start from.
        slow: Whether it imports PyTorch, which takes seconds.
        goes_on: Whether the same command, after an interruption, continues with what is there.
        reads: Verb whose configuration files it reads, too; those of that verb's keys that it lacks are skipped.
        kinds: Verbs whose configurations it takes instead: the keys say which, and its function `NAME_KIND` runs.
        subjects: Package whose modules the option `subject` names; the parameters of the chosen one's function
            `measure` are options, too.
        trainer: Whether it is one of LightningCLI's, whose options are those of the Trainer, the model and the
            data.
        module: Where it was found.
    """

    group: str
    summary: str
    named: tuple[str, ...] = ()
    positional: str | None = None
    examples: tuple[str, ...] = ()
    slow: bool = True
    goes_on: bool = False
    reads: str = ""
    kinds: tuple[str, ...] = ()
    subjects: str = ""
    trainer: bool = False
    module: str = ""

    def modules(self) -> dict[str, str]:
        """Dotted names of its subjects' modules, by subject."""
        package = self.subjects.replace(".", "/")
        files = sorted((PACKAGE_ROOT / package).glob("[a-z]*.py")) if package else []
        return {file.stem.replace("_", "-"): f"{self.subjects}.{file.stem}" for file in files}


def function_name(verb: str) -> str:
    """The function behind a verb."""
    return verb.replace("-", "_").replace(" ", "_")


# What other programs call our verbs.
SYNONYMS = {
    "train": "fit",
    "resume": "fit",
    "finetune": "fit",
    "val": "validate",
    "encode": "precompute",
    "cache": "precompute",
    "sample": "generate",
    "infer": "generate",
    "inference": "generate",
    "run": "generate",
    "metrics": "evaluate",
    "measure": "evaluate",
    "upscale": "upsample",
    "benchmark": "bench",
    "render": "mini-world",
}


@cache
def verbs() -> dict[str, Verb]:
    """Every verb by name, as the modules of this folder state them; none of them is imported."""
    found: list[tuple[str, Verb]] = []
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_bytes()).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["VERBS"]:
                stated = eval(compile(ast.Expression(node.value), file, "eval"), {"Verb": Verb, "RUNS": RUNS})
                found += [(name, replace(verb, module=f"{__name__}.{file.stem}")) for name, verb in stated.items()]
    return dict(sorted(found, key=lambda pair: _GROUPS.index(pair[1].group)))


def overview() -> str:
    """The text of `luve --help`: what it is, the verbs by group, and how options are given."""
    lines = ["usage: luve VERB [--config FILE]... [--key value]...", ""]
    lines += ["Train, compare and run LuVe's video latent upsampler and experts", "(arXiv 2602.11564).", ""]
    for group in dict.fromkeys(verb.group for verb in verbs().values()):
        lines.append(f"{group}:")
        lines += [f"  {name:<14}{verb.summary}" for name, verb in verbs().items() if verb.group == group]
        lines.append("")
    lines += [
        "Every verb takes:",
        "  --config FILE     YAML file; repeat it, a later file holds only differences",
        "  --a.b.c value     set one key, after all files; null disables a callback,",
        "                    logger or loss; a text (a prompt, a name) is literal",
        "  --print_config    print the complete configuration and stop",
        "  --debug           show the traceback of an error",
        "  --help            the verb's options (after a verb), or this text",
        "",
        *_start(),
    ]
    return "\n".join(lines)


def part_overview(first: str) -> str:
    """The text of `luve study --help`: the two-word verbs that begin with this word; empty when there are none."""
    found = {name: verb for name, verb in verbs().items() if name.startswith(f"{first} ")}
    lines = [f"usage: luve {first} VERB [--config FILE]... [--key value]...", ""]
    lines += [f"  {name:<14}{verb.summary}" for name, verb in found.items()]
    return "\n".join([*lines, "", f"`luve {next(iter(found))} --help` lists its options."]) if found else ""


def examples_of(verb: str) -> str:
    """The end of a message about missing keys: configurations to start from, if this installation has them."""
    examples = [example for example in verbs()[verb].examples if (PACKAGE_ROOT / example).is_file()]
    if examples:
        return f"; start from a configuration{_in_checkout()}: luve {verb} --config {' or '.join(examples)}"
    return f"; give a configuration: luve {verb} --config FILE; {_WHERE}" if verbs()[verb].examples else ""


_WHERE = "examples are in the folder experiments of the repository"


def _start() -> list[str]:
    """How to begin: configurations that exist here, or where to get them."""
    commands = [
        *(f"  luve fit --config {example}" for example in RUNS),
        "  luve generate --config experiments/generate/mini.yaml \\",
        '      "a photograph of old coins ."',
    ]
    if all((PACKAGE_ROOT / example).is_file() for example in RUNS):
        return [f"Start here{_in_checkout()}:", *commands]
    return ["Start here: clone the repository; this installation came without", f"configurations ({_WHERE})."]


def _in_checkout() -> str:
    """The folder for the examples' paths, unless it is the current one."""
    return "" if Path.cwd() == PACKAGE_ROOT else f", in {PACKAGE_ROOT}"
