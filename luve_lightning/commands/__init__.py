"""The `luve` command: one verb a file, listed here and imported only when asked for."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    group: str
    summary: str
    module: str
    function: str | None = None
    named: tuple[str, ...] = ()
    positional: str | None = None


_TRAINING = "luve_lightning.commands.training"

VERBS: dict[str, Verb] = {
    "mini-world": Verb(
        "Data",
        "render the mini world's clips and their CSV",
        "luve_lightning.commands.mini_world",
        "mini_world",
    ),
    "precompute": Verb(
        "Data",
        "encode clips into the latent store, once per size",
        "luve_lightning.commands.precompute",
        "precompute",
    ),
    "embed": Verb(
        "Data", "embed captions into the text store, once", "luve_lightning.commands.embed", "embed"
    ),
    "score": Verb(
        "Data", "rate clips, to select training clips by", "luve_lightning.commands.score", "score"
    ),
    "fit": Verb("Training", "train a model, or resume with --ckpt_path last", _TRAINING),
    "validate": Verb("Training", "measure a model on the validation split", _TRAINING),
    "test": Verb("Training", "measure a model on the test split", _TRAINING),
    "predict": Verb("Training", "run a model over a split and write what it gives", _TRAINING),
    "generate": Verb(
        "Generation",
        "make videos of prompts by the cascade of three stages",
        "luve_lightning.commands.generate",
        "generate",
        positional="prompt",
    ),
    "plan": Verb(
        "Generation",
        "say what generating a video takes, before anything runs",
        "luve_lightning.commands.plan",
        "plan",
    ),
    "spectra": Verb(
        "Measurement",
        "measure when frequency bands resolve, suggest a sigma_switch",
        "luve_lightning.commands.spectra",
        "spectra",
    ),
    "judge": Verb(
        "Measurement",
        "ask a multimodal judge about videos, or read its answers",
        "luve_lightning.commands.judge",
        "judge",
        named=("videos",),
    ),
    "upsample": Verb(
        "Measurement",
        "upsample clips by several methods into folders of lossless videos",
        "luve_lightning.commands.upsample",
        "upsample",
    ),
    "evaluate": Verb(
        "Measurement",
        "measure folders of videos, one a method, and compare them in a table",
        "luve_lightning.commands.evaluate",
        "evaluate",
        named=("videos",),
    ),
    "sweep": Verb(
        "Tables",
        "run an ablation table's rows and seeds as a wandb sweep, or here",
        "luve_lightning.commands.sweep",
        "sweep",
        positional="table",
    ),
    "report": Verb(
        "Tables",
        "show tables, curves, spectra, comparisons and videos on one page",
        "luve_lightning.commands.report",
        "report",
        named=("results", "curves", "spectra", "videos"),
    ),
    "dashboards": Verb(
        "Tables",
        "build wandb workspaces, and the same panels as local pages",
        "luve_lightning.commands.dashboards",
        "dashboards",
    ),
    "ablate": Verb(
        "Measurement",
        "repeat one of the paper's tables: every row, several seeds",
        "luve_lightning.commands.ablate",
        "ablate",
        positional="table",
    ),
    "study build": Verb(
        "Measurement",
        "make a page on which people compare methods blind, and its key",
        "luve_lightning.commands.study",
        "study_build",
        named=("videos",),
    ),
    "study tally": Verb(
        "Measurement",
        "count what people chose, with intervals; flag raters",
        "luve_lightning.commands.study",
        "study_tally",
    ),
    "bench": Verb(
        "Measurement",
        "time the models and measure their memory",
        "luve_lightning.commands.bench",
        "bench",
    ),
}


def overview() -> str:
    """The text of `luve --help`: what it is, the verbs by group, and how options are given."""
    lines = ["usage: luve VERB [--config FILE]... [--key value]...", ""]
    lines += ["Train, compare and run LuVe's video latent upsampler and experts (arXiv 2602.11564).", ""]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines.append(f"{group}:")
        lines += [f"  {name:<12}{verb.summary}" for name, verb in VERBS.items() if verb.group == group]
        lines.append("")
    lines += [
        "Every verb takes:",
        "  --config FILE     YAML file; repeat it, a later file holds only its differences",
        "  --a.b.c value     set one key, after all files; null switches a callback, logger or loss off",
        "  --print_config    print the complete configuration and stop",
        "  --debug           show the traceback of an error",
        "  --help            the verb's options (after a verb), or this text",
        "",
        "Start here:  luve fit --config experiments/vluer/mini.yaml",
        "             luve fit --config experiments/experts/mini-adaptation.yaml",
        '             luve generate --config experiments/generate/mini.yaml "a photograph of old coins ."',
    ]
    return "\n".join(lines)
