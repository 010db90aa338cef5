"""Turns what went wrong while a verb runs into one line: what is wrong, where, what would be right.

This covers our errors, what a configured component raises, and errors of the system and of other packages that the
user can fix: a full disk, no memory, no account, a bad file. Anything else is a bug.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

# Without a file in the error, these mean that a program misused the system, which no user can fix.
_MISUSE = {errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ECHILD, errno.ESRCH, errno.ENOTTY, errno.ENOTSOCK}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
# The system's doing even where a library raised another error because of it, as torch.save does.
_AT_THE_BOTTOM = _NO_ROOM | {errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_HINTS = {
    errno.EROFS: "it can only be read: choose another folder",
    errno.ENAMETOOLONG: "a name has at most 255 bytes, a path 4096: choose a shorter one",
    errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n) or use fewer workers",
    errno.ENFILE: "this machine may open no more files: use fewer workers",
    errno.ENOMEM: "use a smaller batch, size or number of workers",
}
_LOADER = re.compile(r"DataLoader worker \(pid\(?s?\)?\s*[\d, ]+\) (?P<end>.+)", re.DOTALL)
_LAST_LINE = re.compile(r"(?P<kind>[\w.]+): (?P<text>.*)")
_IN_FILE = re.compile(r'^\s*File "(?P<path>[^"]+)", line \d+', re.MULTILINE)
_OS_ERROR = re.compile(r"\(os error (?P<number>\d+)\)")  # of Rust's libraries (safetensors, tokenizers)
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (?:not enough|can't allocate) memory|Cannot allocate memory")
_HOST_MEMORY = "use a smaller batch, size, number of frames or number of workers"
_GPU_MEMORY = (
    "use a smaller batch_size, size or number of frames, tiles, a smaller dtype (trainer.precision bf16-mixed), or "
    "recompute activations where the model has that key"
)
_LONG_WORD = re.compile(r"(\S{200})\S{900,}")
_PACKAGE = str(Path(__file__).resolve().parents[1])
_WORKER = re.compile(r"Caught \w+ in \w+ worker process")


class UsageError(Exception):
    """What the user can fix; the message is the one line to print."""


def one_line(text: object) -> str:
    """A message of several lines as one."""
    return legible(" ".join(str(text).split()))


def legible(text: str) -> str:
    """A text whose words, such as names in a file that a stranger made, are short enough to read."""
    return _LONG_WORD.sub(lambda found: f"{found[1]}... ({len(found[0]):,} characters)", text)


def describe_constructor_error(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """Describes a failure while the components of a checked configuration are made.

    Args:
        error: What jsonargparse raised around a constructor's error, or the latter itself.
        config: The composed configuration.

    Returns:
        One line that begins with the component's key, or None for a bug in a constructor.
    """
    raised = next((level for level in _chain(error) if not _raised_in(level).startswith("jsonargparse")), error)
    if not isinstance(error, ValueError | TypeError | OSError | ImportError):
        return describe_runtime_error(error, config)
    trainer = {"class_path": "Trainer", "init_args": config.get("trainer")}
    key = _component_at_fault(raised, {**config, "trainer": trainer})
    return f"{key}: {one_line(raised)}" if key else one_line(raised)


def describe_runtime_error(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """Describes a failure while a verb runs, when the user can fix it.

    These are our error classes, Lightning's MisconfigurationException, a ValueError raised by our own code, and
    what `_describe_outside_error` recognises. Ours is this package and any other package whose classes the
    configuration names, except Lightning and PyTorch. Anything else is a bug and deserves its traceback.

    Returns:
        One line, or None for a bug.
    """
    text = str(error)
    if _WORKER.match(text):  # a DataLoader worker's error arrives as text
        return _describe_worker_error(text)
    key = _component_at_fault(error, config)
    if (outside := _describe_outside_error(error)) is not None:
        return one_line(f"{key}: {outside}" if key and key != "trainer" else outside)
    configured = {path.partition(".")[0] for path, _, _ in components(config)}
    ours = {"luve_lightning"} | configured - {"lightning", "torch"}
    raised_in = _raised_in(error)
    mendable = (
        type(error).__module__.partition(".")[0] in ours
        or (isinstance(error, OSError) and error.errno is None)  # a library's, such as transformers'
        or type(error).__name__ == "MisconfigurationException"
        or (isinstance(error, ValueError) and raised_in.partition(".")[0] in ours)
    )
    if not mendable:
        return None
    return f"{key}: {one_line(text)}" if key else one_line(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown word: the closest known one, or all of them when they are few."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 24 else ""


def _component_at_fault(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """The key of the outermost configured component whose method is on the error's traceback."""
    configured = list(components(config))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "self" in frame.f_code.co_freevars:
            continue  # a function that a component put around one of the Trainer's, which runs everything
        owner = type(frame.f_locals.get("self")).__name__
        found = [(key, arguments) for path, key, arguments in configured if path.rpartition(".")[2] == owner]
        if not found:
            continue
        keys, arguments = [key for key, _ in found], found[0][1]
        # The argument at fault: the message's first word, or one written as `name=value`.
        words = [*re.findall(r"^\w+", str(error)), *re.findall(r"`(\w+)=", str(error))]
        named = [word for word in words if word in arguments]
        if named and len(keys) == 1:
            return f"{keys[0]}.{named[0]}" if keys[0] == "trainer" else f"{keys[0]}.init_args.{named[0]}"
        return " or ".join(keys)
    return None


def components(node: Any, path: str = "") -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Class path, dotted key and arguments of every component in a configuration."""
    if isinstance(node, Mapping) and isinstance(node.get("class_path"), str):
        yield node["class_path"], path, node.get("init_args") or {}
    for key, value in entries(node):
        yield from components(value, f"{path}.{key}" if path else str(key))


def entries(node: Any) -> Iterable[tuple[Any, Any]]:
    """The keys or positions of a mapping or list, with what they hold; nothing for anything else."""
    if isinstance(node, Mapping):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _raised_in(error: BaseException) -> str:
    """The module that raised an error."""
    frames = _frames(error)
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _describe_outside_error(error: BaseException) -> str | None:
    """Describes an error that neither this package nor a component raised, when the user can fix it, else None.

    Decided by class where the libraries have classes, by text only where they raise a bare RuntimeError.
    """
    found = (describe(error) for describe in (_system, _memory, _account, _hub, _environment, _worker, _file))
    return next((text for text in found if text is not None), None)


def _describe_worker_error(text: str) -> str | None:
    """Describes an error of a loader's worker, which arrives as a traceback's text, if the user can fix it."""
    last = _LAST_LINE.fullmatch(text.strip().splitlines()[-1])
    if last is None:
        return None
    files = _IN_FILE.findall(text)
    name = last["kind"].rpartition(".")[2]
    ours = last["kind"].startswith("luve_lightning.") or (
        name == "ValueError" and bool(files) and files[-1].startswith(_PACKAGE)
    )
    if name in ("MemoryError", "OutOfMemoryError", "_ArrayMemoryError"):
        return f"{last['text']}; {_HOST_MEMORY}"
    return last["text"] if ours or "[Errno " in last["text"] else None


def _no_room(path: Path) -> str:
    """How much space is free where a file was to be written."""
    folder = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    return f" ({shutil.disk_usage(folder).free / 2**20:.1f} MiB free in {folder})" if folder else ""


def _system(error: BaseException) -> str | None:
    """An OSError: its file, or the one that was being written; the system's text; a remedy."""
    bottom = (link for link in _chain(error) if isinstance(link, OSError) and link.errno in _AT_THE_BOTTOM)
    system = next(bottom, error)
    number = system.errno if isinstance(system, OSError) else _number_in(system)
    if number is None:
        return None
    name = system.filename if isinstance(system, OSError) else None
    if name is None and number in _MISUSE:
        return None
    reason = os.strerror(number)
    if isinstance(system, OSError) and system.strerror and type(system).__module__ != "builtins":
        reason = system.strerror  # PyAV has its own numbers and texts
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else _path_in_use(error)
    if number in _NO_ROOM:
        reason = f"{'disk full' if number == errno.ENOSPC else 'disk quota used up'}: {reason}"
        reason += _no_room(path) if path else ""
    hint = f"; {_HINTS[number]}" if number in _HINTS else ""
    target = getattr(system, "filename2", None)
    return f"{_shown(path)}{f' -> {target}' if target else ''}: {reason}{hint}" if path else reason + hint


def _number_in(error: BaseException) -> int | None:
    """The errno in the text of an error from a library written in Rust."""
    match = _OS_ERROR.search(str(error)) if not isinstance(error, ValueError | KeyError) else None
    return int(match["number"]) if match else None


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:200]}...({len(text.encode())} bytes)"


def _memory(error: BaseException) -> str | None:
    text = str(error).splitlines()[0] if str(error) else "out of memory"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; a RuntimeError in name only
        return f"GPU memory is full: {text}; {_GPU_MEMORY}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return f"memory is full: {text}; {_HOST_MEMORY}"
    return None


def _account(error: BaseException) -> str | None:
    """What wandb refuses: no login, a wrong key, no network, a setting (WANDB_MODE and the like)."""
    if _is_of(error, "pydantic_core") and any(_is_wandbs(frame) for frame in _frames(error)):
        invalid: Any = error
        first = invalid.errors()[0]
        return f"wandb: {'.'.join(map(str, first['loc']))}: {first['msg']}; got {first['input']!r}"
    if not _is_of(error, "wandb.errors"):
        return None
    return (
        f"wandb: {one_line(error).rstrip('.')}; run `wandb login`, or log offline: "
        "--loggers.wandb.init_args.offline true, or WANDB_MODE=offline"
    )


def _is_wandbs(frame: FrameType) -> bool:
    """Whether the error is wandb's, or comes from making wandb's settings here."""
    return frame.f_code.co_name == "quiet_wandb" or str(frame.f_globals.get("__name__")).startswith("wandb.")


def _hub(error: BaseException) -> str | None:
    """The Hugging Face hub cannot be reached, or has no such name."""
    found = next((link for link in _chain(error) if _is_of(link, "huggingface_hub.errors")), None)
    if found is None or _raised_in(error).startswith("luve_lightning."):
        return None  # ours has its own words
    return f"{one_line(found)}; a local folder works without the hub"


def _environment(error: BaseException) -> str | None:
    """Lightning's errors about the cluster it runs in, and about its Trainer's options."""
    raised_in = _raised_in(error)
    if isinstance(error, RuntimeError) and raised_in.startswith("lightning.fabric.plugins.environments."):
        return str(error)
    building = any(
        frame.f_code.co_name == "__init__" and frame.f_globals.get("__name__") == "lightning.pytorch.trainer.trainer"
        for frame in _frames(error)
    )
    if building and isinstance(error, ValueError | TypeError) and raised_in.startswith("lightning."):
        return f"trainer: {error}"
    return None


def _worker(error: BaseException) -> str | None:
    """A loader's worker that ended without an error of its own."""
    match = _LOADER.match(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    end = " ".join(match["end"].split()).partition(".")[0]
    shared = Path("/dev/shm")
    free = f" ({shutil.disk_usage(shared).free / 2**20:.0f} MiB free)" if shared.is_dir() else ""
    return (
        f"a loader's worker {end}: most often memory, or shared memory in /dev/shm{free}, is full; use fewer "
        "num_workers (0 loads in the training process) or a smaller batch_size"
    )


def _file(error: BaseException) -> str | None:
    """A file that cannot be read as what it should be, if the error comes from reading one."""
    names = {base.__name__ for base in type(error).__mro__}
    unreadable = {"JSONDecodeError", "UnicodeDecodeError", "BadZipFile", "YAMLError", "SafetensorError"}
    if not (names & (unreadable | {"UnpicklingError", "EOFError", "ArrowInvalid"}) or _parser_gave_up(error)):
        return None
    path = _path_in_use(error, must_exist=True)
    if path is None:
        return None
    reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return f"{_shown(path)}: cannot be read: {reason or type(error).__name__}"


def _parser_gave_up(error: BaseException) -> bool:
    """Whether JSON or YAML is nested deeper than its parser can go."""
    frames = _frames(error)
    modules = {str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames[-20:]}
    return isinstance(error, RecursionError) and bool(modules & {"json", "yaml"})


def _path_in_use(error: BaseException, must_exist: bool = False) -> Path | None:
    """The path that the innermost function with one among its variables was working on."""
    for frame in reversed(_frames(error)):
        variables = list(frame.f_locals.items())
        paths = [value for name, value in variables if isinstance(value, Path) and name != "self"]
        paths += [Path(value) for name, value in variables if "path" in name.lower() and isinstance(value, str)]
        # Of a temporary file and its target, the target: the user knows its name.
        for path in sorted(paths, key=lambda path: path.name.startswith(".")):
            if (path.is_absolute() or str(path) not in (".", "")) and (not must_exist or _is_file(path)):
                return path
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_of(error: BaseException, module: str) -> bool:
    return any(base.__module__.startswith(module) for base in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
