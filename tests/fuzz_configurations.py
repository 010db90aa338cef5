"""Runs verbs over configurations with random mistakes in them, and sorts what comes out.

    python -m tests.fuzz_configurations --count 500 --seed 0

Each case is one real configuration of the mini world made tiny (tests/conf), with one to three mistakes: a wrong type,
a huge or negative number, a misspelt or missing key, a class that is none, text with interpolations. It runs in a
forked process with limits on time and memory, and must end well or with one line that names the mistake.
tests/test_fuzzed_configurations.py runs a few of them in the suite, and all of them for this command.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luve_lightning.cli import verbs
from luve_lightning.config_files import merge, read_config
from tests.test_experiments import EXPERIMENTS, documented_command, overlays

CPU_SECONDS, WALL_SECONDS, MEMORY = 90, 400, 8 * 2**30
ARGUMENTS = "LUVE_FUZZ"  # environment variable with this command's arguments, for the test

_WHOLE = (-1, 0, 1, 2, 3, 7, 16, 64, 1000, 10**5, 10**9, 10**18, -(10**9))
_REAL = (-1.0, 0.0, 0.5, 1.0, 3.0, 1e3, 1e-300, 1e300, math.nan, math.inf, -math.inf)
_NUMBERS = (*_WHOLE, *_REAL)
_TEXTS = (
    "abc", "", " ", "null", "${nosuch}", "${oc.env:NO_SUCH_VARIABLE}", "${trainer", "???", "{a|b}", "[1, 2",
    "a: b: c", "\u2028", "\x00", "x" * 5000, "/dev/null", "/nosuch/file", "no/such", "no/such/folder", "..", "~",
    "%s", "-1", "1e9", "true", "日本語", "Wan-AI/No-Such-Model",
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [1, 2], [None], ["a", "b"], {"a": 1}, [[1]], [10**9])
_CLASSES = (
    "no.such.Class", "torch.nn.Linear", "torch.nn.Identity", "luve_lightning", "", "Class", "builtins.dict",
    "luve_lightning.losses.L1", "lightning.pytorch.Trainer", "luve_lightning.tasks.NoSuchTask", 5,
)  # fmt: skip

_MISTAKES = (
    "value", "value", "value", "number", "text", "text", "other", "unknown", "misspelt", "removed", "removed", "class",
    "list",
)  # fmt: skip

NAMES = (
    "vluer/mini", "experts/mini-adaptation", "experts/mini-lfe", "experts/mini-hfe", "mini/vae", "mini/backbone",
    "precompute/mini", "precompute/mini-variants", "embed/mini", "score/mini", "generate/mini", "upsample/mini",
    "evaluate/mini", "spectra/mini", "report/mini", "dashboards/vluer",
)  # fmt: skip

Tree = dict[str, Any]
Path_ = tuple[Any, ...]


@dataclass(frozen=True)
class Base:
    """A verb and a configuration of it that works."""

    name: str
    verb: str
    config: Tree


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ok, refused, internal or hang."""

    number: int
    base: Base
    mistakes: tuple[str, ...]
    kind: str
    text: str

    @property
    def bad(self) -> bool:
        """Whether there is something to mend."""
        return self.kind in ("internal", "hang")

    @property
    def in_short(self) -> str:
        """The first line, and with a refusal its message."""
        message = self.text.splitlines()[-1][:400] if self.kind == "refused" else ""
        return "\n    ".join([str(self).splitlines()[0], *([message] if message else [])])

    def __str__(self) -> str:
        return f"case {self.number}, {self.base.name}, {'; '.join(self.mistakes)}: {self.kind}\n{self.text}"


def bases() -> list[Base]:
    """The mini world's configurations as the overlays make them tiny, and a few verbs without a file."""
    found = []
    for name in NAMES:
        verb, files = documented_command(EXPERIMENTS / f"{name}.yaml")
        tree: dict[str, Any] = {}
        for file in [*files, *overlays(verb, files)]:
            tree = merge(tree, read_config(file))
        if verb == "fit":  # or a run without its `max_steps` would take Lightning's 1000 epochs
            tree["trainer"]["max_epochs"] = 2
        found.append(Base(f"{verb} {name}", verb, without_marks(tree)))
    by_name = {base.name: base for base in found}
    vluer, cascade = by_name["fit vluer/mini"], by_name["generate generate/mini"]
    found += [Base(f"{verb} vluer/mini", verb, vluer.config) for verb in ("validate", "test")]
    keys = ("backbone", "height", "width", "num_frames", "motion_height", "motion_width", "scale", "steps", "shift")
    found.append(Base("plan", "plan", {key: cascade.config[key] for key in keys if key in cascade.config}))
    world = {"output": "${oc.env:TINY_RUN}/world", "train": 1, "val": 1, "test": 1, "frames": 5, "size": 16}
    found.append(Base("mini-world", "mini-world", world | {"processes": 1, "seed": 0, "fps": 16}))
    return found


def without_marks(node: Any) -> Any:
    """A configuration in which what is switched off is null, as a file would have it."""
    if isinstance(node, dict):
        return {key: without_marks(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_marks(value) for value in node]
    return None if type(node) is object else node


def cases(
    bases: list[Base], count: int, seed: int, first: int = 0
) -> Iterator[tuple[int, Base, Tree, tuple[str, ...]]]:
    """Number, base, configuration and mistakes of each case; each depends on (seed, number) alone."""
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        base = bases[number % len(bases)]
        config = copy.deepcopy(base.config)
        mistakes = tuple(spoil(config, rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3))))
        yield number, base, config, mistakes


def spoil(config: Tree, rng: random.Random) -> str:
    """Makes one mistake in place; says which."""
    places = list(_places(config))
    if not places:
        return "nothing left"
    place = rng.choice(places)
    parent, key = _parent(config, place), place[-1]
    classes = [other for other in places if other[-1] == "class_path"]
    numbers = [other for other in places if _is_number(_parent(config, other)[other[-1]])]
    what = rng.choice(_MISTAKES)
    if what in ("number", "value", "list") and numbers:
        place = rng.choice(numbers)
    if what == "class" and classes:
        place = rng.choice(classes)
    parent, key = _parent(config, place), place[-1]
    dotted = ".".join(map(str, place))
    if what == "value" and _is_number(parent[key]):  # of the right type, so that it comes past the signatures
        parent[key] = rng.choice(_WHOLE if isinstance(parent[key], int) else _REAL)
    elif what in ("number", "value"):
        parent[key] = rng.choice(_NUMBERS)
    elif what == "text":
        parent[key] = rng.choice(_TEXTS)
    elif what == "other":
        parent[key] = copy.deepcopy(rng.choice(_OTHERS))
    elif what == "class":
        parent[key] = rng.choice(_CLASSES)
    elif what == "list":
        parent[key] = [parent[key]] * rng.choice((1, 2, 3, 50))
    elif what == "unknown" and isinstance(parent, dict):
        parent["no_such_key"] = rng.choice((*_NUMBERS, *_OTHERS))
        return f"{dotted}: sibling no_such_key added"
    elif what == "misspelt" and isinstance(parent, dict) and len(str(key)) > 2:
        cut = rng.randrange(len(str(key)) - 1)
        name = str(key)
        parent[name[:cut] + name[cut + 1] + name[cut] + name[cut + 2 :]] = parent.pop(key)
        return f"{dotted}: misspelt"
    else:
        del parent[key]
        return f"{dotted}: removed"
    return f"{dotted}: {str(parent[key])[:60]!r}"


def _places(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Where every key and every element of a list is."""
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        entries = node.items()
    elif isinstance(node, list):
        entries = enumerate(node)
    for key, value in entries:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _parent(config: Tree, place: Path_) -> Any:
    node: Any = config
    for key in place[:-1]:
        node = node[key]
    return node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_case(number: int, base: Base, config: Tree, mistakes: tuple[str, ...], folder: Path) -> Outcome:
    """Runs one case in a forked process, in a folder of its own."""
    (folder / "here").mkdir(parents=True)
    file, log = folder / "case.yaml", folder / "output.txt"
    file.write_text(yaml.safe_dump(config, allow_unicode=False), encoding="utf-8")
    child = os.fork()
    if child == 0:
        _child([base.verb, "--config", str(file)], folder, log)
    kind = _wait(child)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    tail = "\n".join(text.splitlines()[-25:])
    if kind == "ok" and "Traceback (most recent call last)" in text:
        kind = "internal"
    if kind == "refused" and (
        "Traceback (most recent call last)" in text or text.count(f"luve {base.verb}: error: ") != 1
    ):
        kind = "internal"
    return Outcome(number, base, mistakes, kind, tail)


def _child(words: list[str], folder: Path, log: Path) -> None:
    """The forked process: never returns."""
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ |= {"TINY_RUN": str(folder / "run"), "WANDB_DATA_DIR": str(folder / "wandb")}
        os.chdir(folder / "here")
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (_virtual() + MEMORY, _virtual() + MEMORY))
        sys.argv = [str(Path(sys.executable).with_name("luve")), *words]  # what more processes would be started with

        from luve_lightning.__main__ import main

        code = main(words)
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()  # ends its own process, as the end of this one would
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _virtual() -> int:
    """Bytes of address space that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _wait(child: int) -> str:
    """Waits for a process, ends it and its children when it takes too long, and says how it ended."""
    end = time.monotonic() + WALL_SECONDS
    status: int | None = None
    while status is None and time.monotonic() < end:
        found, status_now = os.waitpid(child, os.WNOHANG)
        status = status_now if found else None
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return "hang"
    if os.WIFSIGNALED(status):
        return "hang" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "internal"
    return {0: "ok", 2: "refused"}.get(os.WEXITSTATUS(status), "internal")


def table(outcomes: list[Outcome]) -> str:
    """How many cases of each configuration ended how."""
    counts = Counter((outcome.base.name, outcome.kind) for outcome in outcomes)
    kinds = ("ok", "refused", "internal", "hang")
    names = sorted({outcome.base.name for outcome in outcomes})
    lines = [f"{'configuration':<34}" + "".join(f"{kind:>10}" for kind in kinds)]
    for name in names:
        lines.append(f"{name:<34}" + "".join(f"{counts[name, kind]:>10}" for kind in kinds))
    totals = (sum(counts[name, kind] for name in names) for kind in kinds)
    return "\n".join([*lines, f"{'all':<34}" + "".join(f"{total:>10}" for total in totals)])


def run_logged(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Is a process of the tests' server, which has imported the package; its exit status is the command's."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    sys.exit(main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: in a test, runs the cases; by itself, runs that test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--report", type=Path, help="file for every case and the table")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # given by the test: where cases run
    options = parser.parse_args(arguments)
    numbers = {"--count": options.count, "--seed": options.seed, "--first": options.first}
    if options.folder is None:
        import pytest

        words = [f"{name}={number}" for name, number in numbers.items()]
        words += [f"--report={options.report.resolve()}"] if options.report else []
        os.environ[ARGUMENTS] = " ".join(words)
        test = Path(__file__).with_name("test_fuzzed_configurations.py")
        return int(pytest.main(["-q", "-p", "no:cacheprovider", str(test)]))
    outcomes = []
    with (options.report or options.folder / "report.txt").open("a", encoding="utf-8") as report:
        # Nothing is computed in this process: the threads of OpenMP would be missing in the forked ones.
        for verb in verbs().values():
            importlib.import_module(verb.module)
        for number, base, config, mistakes in cases(bases(), options.count, options.seed, options.first):
            outcome = run_case(number, base, config, mistakes, options.folder / f"case-{number}")
            outcomes.append(outcome)
            print(outcome if outcome.bad else outcome.in_short, file=report, flush=True)
        print(table(outcomes), file=report)
    print("\n\n".join([table(outcomes), *(str(outcome) for outcome in outcomes if outcome.bad)]))
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
