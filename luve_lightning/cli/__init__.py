"""The `luve` command: one verb a file, listed here and imported only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luve_lightning.checkout import PACKAGE_ROOT


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        group: Heading under which `luve --help` lists it.
        summary: What it does, in one line.
        module: Module to import when the verb runs.
        function: Function in that module whose signature is the verb's options. None for the verbs of
            LightningCLI, whose options are those of the Trainer, the model and the data.
        named: Options that are dictionaries by name and may be given as `--option NAME=VALUE`, repeated.
        positional: The option whose value may be given as a word of its own, without `--option` before it.
        examples: Configurations in the repository to start from.
        slow: Whether it imports PyTorch, which takes seconds.
        goes_on: Whether the same command, after an interruption, keeps what is there.
    """

    group: str
    summary: str
    module: str
    function: str | None = None
    named: tuple[str, ...] = ()
    positional: str | None = None
    examples: tuple[str, ...] = ()
    slow: bool = True
    goes_on: bool = False


_TRAINING = "luve_lightning.cli.training"
_RUNS = ("experiments/vluer/mini.yaml", "experiments/experts/mini-adaptation.yaml")

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

VERBS: dict[str, Verb] = {
    "mini-world": Verb(
        "Data",
        "render the mini world's clips and their CSV",
        "luve_lightning.cli.mini_world",
        "mini_world",
        goes_on=True,
    ),
    "precompute": Verb(
        "Data",
        "encode clips into the latent store, once per size",
        "luve_lightning.cli.precompute",
        "precompute",
        examples=("experiments/precompute/mini.yaml",),
        goes_on=True,
    ),
    "embed": Verb(
        "Data",
        "embed captions into the text store, once",
        "luve_lightning.cli.embed",
        "embed",
        examples=("experiments/embed/mini.yaml",),
        goes_on=True,
    ),
    "score": Verb(
        "Data",
        "rate clips, to select training clips by",
        "luve_lightning.cli.score",
        "score",
        examples=("experiments/score/mini.yaml",),
        goes_on=True,
    ),
    "fit": Verb("Training", "train a model, or resume with --ckpt_path last", _TRAINING, examples=_RUNS),
    "validate": Verb("Training", "measure a model on the validation split", _TRAINING, examples=_RUNS),
    "test": Verb("Training", "measure a model on the test split", _TRAINING, examples=_RUNS),
    "predict": Verb(
        "Training", "run a model over a split and write what it gives", _TRAINING, examples=_RUNS
    ),
    "generate": Verb(
        "Generation",
        "make videos of prompts by the cascade of three stages",
        "luve_lightning.cli.generate",
        "generate",
        positional="prompt",
        examples=("experiments/generate/mini.yaml",),
        goes_on=True,
    ),
    "plan": Verb(
        "Generation",
        "say what generating a video takes, before anything runs",
        "luve_lightning.cli.plan",
        "plan",
    ),
    "spectra": Verb(
        "Measurement",
        "measure when frequency bands resolve, suggest a sigma_switch",
        "luve_lightning.cli.spectra",
        "spectra",
        examples=("experiments/spectra/mini.yaml",),
    ),
    "judge": Verb(
        "Measurement",
        "ask a multimodal judge about videos, or read its answers",
        "luve_lightning.cli.judge",
        "judge",
        named=("videos",),
    ),
    "upsample": Verb(
        "Measurement",
        "upsample clips by several methods into folders of videos",
        "luve_lightning.cli.upsample",
        "upsample",
        examples=("experiments/upsample/mini.yaml",),
        goes_on=True,
    ),
    "evaluate": Verb(
        "Measurement",
        "measure folders of videos, one a method, in one table",
        "luve_lightning.cli.evaluate",
        "evaluate",
        examples=("experiments/evaluate/metrics.yaml", "experiments/evaluate/mini.yaml"),
        named=("videos",),
        goes_on=True,
    ),
    "sweep": Verb(
        "Tables",
        "run an ablation table's rows and seeds as a wandb sweep, or here",
        "luve_lightning.cli.sweep",
        "sweep",
        positional="table",
    ),
    "report": Verb(
        "Tables",
        "show tables, curves, dashboards, spectra, comparisons and videos on one page",
        "luve_lightning.cli.report",
        "report",
        named=("results", "curves", "spectra", "videos"),
    ),
    "dashboards": Verb(
        "Tables",
        "build wandb workspaces from definitions",
        "luve_lightning.cli.dashboards",
        "dashboards",
    ),
    "ablate": Verb(
        "Measurement",
        "repeat one of the paper's tables: every row, several seeds",
        "luve_lightning.cli.ablate",
        "ablate",
        positional="table",
        goes_on=True,
    ),
    "study build": Verb(
        "Measurement",
        "make a page on which people compare methods blind, and its key",
        "luve_lightning.cli.study",
        "study_build",
        named=("videos",),
    ),
    "study tally": Verb(
        "Measurement",
        "count what people chose, with intervals; flag raters",
        "luve_lightning.cli.study",
        "study_tally",
    ),
    "bench": Verb(
        "Measurement",
        "time the models and measure their memory",
        "luve_lightning.cli.bench",
        "bench",
    ),
    "completion": Verb(
        "Shell",
        "print a script that completes verbs and keys in bash or zsh",
        "luve_lightning.cli.completion",
        "completion",
        positional="shell",
        slow=False,
    ),
}


def overview() -> str:
    """The text of `luve --help`: what it is, the verbs by group, and how options are given."""
    lines = ["usage: luve VERB [--config FILE]... [--key value]...", ""]
    lines += ["Train, compare and run LuVe's video latent upsampler and experts", "(arXiv 2602.11564).", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines.append(f"{group}:")
        lines += [f"  {name:<12}{verb.summary}" for name, verb in VERBS.items() if verb.group == group]
        lines.append("")
    lines += [
        "Every verb takes:",
        "  --config FILE     YAML file; repeat it, a later file holds only differences",
        "  --a.b.c value     set one key, after all files; null switches a callback,",
        "                    logger or loss off; a text (a prompt, a name) is literal",
        "  --print_config    print the complete configuration and stop",
        "  --debug           show the traceback of an error",
        "  --help            the verb's options (after a verb), or this text",
        "",
        *_start(),
    ]
    return "\n".join(lines)


def part_overview(first: str) -> str:
    """The text of `luve study --help`: the verbs of two words that begin with this one; empty when there are none."""
    found = {name: verb for name, verb in VERBS.items() if name.startswith(f"{first} ")}
    lines = [f"usage: luve {first} VERB [--config FILE]... [--key value]...", ""]
    lines += [f"  {name:<14}{verb.summary}" for name, verb in found.items()]
    return "\n".join([*lines, "", f"`luve {next(iter(found))} --help` lists its options."]) if found else ""


def examples_of(verb: str) -> str:
    """Ends a message about missing keys: configurations to start from, if this installation has them."""
    examples = [example for example in VERBS[verb].examples if (PACKAGE_ROOT / example).is_file()]
    if examples:
        return f"; start from a configuration{_in_checkout()}: luve {verb} --config {' or '.join(examples)}"
    return f"; give a configuration: luve {verb} --config FILE; {_WHERE}" if VERBS[verb].examples else ""


_WHERE = "examples are in the folder experiments of the repository"


def _start() -> list[str]:
    """How to begin: with configurations that are there, or where to get them."""
    commands = [
        *(f"  luve fit --config {example}" for example in _RUNS),
        "  luve generate --config experiments/generate/mini.yaml \\",
        '      "a photograph of old coins ."',
    ]
    if all((PACKAGE_ROOT / example).is_file() for example in _RUNS):
        return [f"Start here{_in_checkout()}:", *commands]
    return ["Start here: clone the repository; this installation came without", f"configurations ({_WHERE})."]


def _in_checkout() -> str:
    """Where the examples' paths are to be given, unless it is here."""
    return "" if Path.cwd() == PACKAGE_ROOT else f", in {PACKAGE_ROOT}"
