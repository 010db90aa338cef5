"""Other projects' videos, matched with their prompts by file name or by a table, in the layout that is evaluated."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from luve_lightning.data.clip_container import ClipError
from luve_lightning.data.clips import probe_clip
from luve_lightning.data.hashes import FileHashes
from luve_lightning.data.prompts import PromptLine, read_prompt_file
from luve_lightning.data.video_files import find_videos, video_name
from luve_lightning.evaluation.video_sets import read_prompts
from luve_lightning.files import find_json, replacing, write_text

_LEAST = 8  # letters of a beginning that tells a prompt: fewer are a word that many prompts begin with
# What projects append to the prompt: numbers, seeds, hashes, scales, sizes and names of a step.
_APPENDED = re.compile(
    r"\d+|seed\d*|[0-9a-f]{8}|x\d|\d+x|\d+[pk]|\d+x\d+|\d*fps\d*|sr|vsr|hr|lr|out|output|result|final|upscaled|enhanced|"
    r"sample\d*|video"
)
# Words before a number that alone names a file.
_NUMBERED = ("video", "sample", "output", "result", "clip", "prompt", "out", "gen", "generated")


@dataclass(frozen=True)
class PromptedName:
    """A video that other methods made, or will make: its name and prompt.

    Attributes:
        name: file name without suffix, by which `luve evaluate` matches methods.
        prompt: what it shows.
        seed: its seed, where known.
    """

    name: str
    prompt: str
    seed: int | None = None

    @property
    def words(self) -> str:
        """The prompt as file names are compared with it, see `words_of`."""
        return words_of(self.prompt)


@dataclass
class Ingested:
    """What became of a folder.

    Attributes:
        made: files brought in.
        there: those that were there already.
        unmatched: (file, why, with the nearest prompt) of those without a prompt.
        ambiguous: (file, what it could be) of those that several prompts fit, or several files one.
        unreadable: (file, why) of those that are no videos.
        missing: names of prompts without a video.
    """

    made: int = 0
    there: int = 0
    unmatched: list[tuple[str, str]] = field(default_factory=list)
    ambiguous: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Match:
    """A file's prompt: which, by what, and which sample of it."""

    name: PromptedName
    by: str
    sample: int | None = None


class _Refused(ValueError):
    """Why a file has no prompt; `ambiguous` where it has several."""

    def __init__(self, reason: str, ambiguous: bool = False) -> None:
        super().__init__(reason)
        self.ambiguous = ambiguous


def words_of(text: str) -> str:
    """The words of a text in lower case, joined by hyphens; letters of any script stay, other signs do not."""
    return "-".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower()))


def prompted_names(source: Path, seed: int = 0) -> list[PromptedName]:
    """The names and prompts that videos are matched with.

    Args:
        source: folder that `luve generate`, `luve upsample` or `luve ingest` wrote, or a file of prompts, whose names
            are those that `luve generate --prompts` gives its videos.
        seed: seed of lines of the file that have none.

    Raises:
        FileNotFoundError: no such file or folder, or no prompt there.
        ValueError: not a file of prompts.
    """
    if not source.is_dir():
        lines: list[PromptLine] = read_prompt_file(source)
        seeds = [seed if line.seed is None else line.seed for line in lines]
        return [PromptedName(a.video_name(b), a.prompt, b) for a, b in zip(lines, seeds, strict=True)]
    found = []
    for file in sorted(source.glob("*.json")):
        about = find_json(file)
        if isinstance(about.get("prompt"), str):
            recipe = about.get("recipe")
            own = recipe.get("seed") if isinstance(recipe, dict) else None
            found.append(PromptedName(video_name(file), about["prompt"], own if isinstance(own, int) else None))
    if not found:
        raise FileNotFoundError(f"prompts: {source}: no JSON file with a prompt in this folder")
    return sorted(found, key=lambda one: (one.seed or 0, one.name))


class VideoMatcher:
    """Finds the prompts of a folder's files.

    A file's name is compared by its words, after numbers before it and seeds, scales and the like behind it are taken
    off. It is a prompt's when it holds the name of its video, is all its words or their beginning, cut anywhere, or
    holds all of them; words that all files begin with, such as FlashVSR's own, may stand before. A number alone is the
    prompt's place in the file of prompts. Numbers behind the words are samples, VBench's `prompt-0.mp4` and on.

    Args:
        names: what there is to find.
        numbered: whether their order means something.
        first: number of the first prompt; None is 0 or 1, whichever the numbers of the folder show.
    """

    def __init__(self, names: Sequence[PromptedName], numbered: bool = True, first: int | None = None) -> None:
        self.names, self.numbered, self.first, self.before = names, numbered, first, 0
        self.by_name = {one.name: one for one in names}
        self.own = {words_of(one.name): one for one in names}
        self.by_words: dict[str, list[PromptedName]] = defaultdict(list)
        for one in names:
            self.by_words[one.words].append(one)

    def begin(self, stems: Sequence[str]) -> None:
        """Look at all names of a folder: how many words all begin with, and whether numbers begin at 0 or 1."""
        columns = list(zip(*(words_of(stem).split("-") for stem in stems), strict=False)) if len(stems) > 1 else []
        self.before = next((i for i, words in enumerate(columns) if len(set(words)) > 1), len(columns))
        numbers = [number for stem in stems if (number := _only_number(stem)) is not None]
        if self.first is None and numbers and (0 in numbers or max(numbers) == len(self.names)):
            self.first = 0 if 0 in numbers else 1

    def match(self, stem: str) -> _Match:
        """The prompt of a file.

        Raises:
            _Refused: it has none, or several.
        """
        if stem in self.by_name:
            return _Match(self.by_name[stem], "name")
        words = words_of(stem)
        inside = [name for name in self.own if len(name) >= _LEAST and f"-{name}-" in f"-{words}-"]
        if inside:
            return _Match(self.own[max(inside, key=len)], "name")
        for start in range(self.before + 1):
            if match := self._by_words("-".join(words.split("-")[start:])):
                return match
        number = _only_number(stem)
        if number is None:
            raise _Refused(self.nearest(words_of(stem)))
        return self._numbered(number)

    def _by_words(self, name: str) -> _Match | None:
        """The prompt of a file by the words of its name, or of a part of it; None where none fits."""
        ways: tuple[tuple[str, Callable[[str], list[str]], bool], ...] = (
            ("words", self._equal, False),
            ("beginning", self._cut, True),
            ("words inside", self._inside, True),
        )
        for by, find, first_only in ways:
            found: dict[str, list[str]] = {}
            for words, off in _spellings(name):
                for known in find(words):
                    found.setdefault(known, [*words.partition(known)[2].split("-"), *off])
                if found and first_only:
                    break
            if len(found) > 1:
                fits = " or ".join(repr(self.by_words[known][0].prompt[:60]) for known in sorted(found)[:3])
                raise _Refused(f"{len(found)} prompts fit: {fits}", ambiguous=True)
            for known, off in found.items():
                return self._choose(known, by, off)
        return None

    def of_prompt(self, prompt: str, stem: str) -> _Match:
        """The name of a prompt from a table; the file's name tells which sample it is."""
        words = words_of(prompt)
        if words not in self.by_words:
            raise _Refused(f"its prompt {prompt[:60]!r} is not among those given; {self.nearest(words)}")
        return self._choose(words, "table", _spellings(stem)[-1][1])

    def nearest(self, words: str) -> str:
        """The prompt whose words are most like these."""
        length = max(_LEAST, len(words))
        near = {known[:length]: known for known in self.by_words}
        found = difflib.get_close_matches(words, near, n=1, cutoff=0.6)
        return f"nearest: {self.by_words[near[found[0]]][0].prompt[:60]!r}" if found else "no prompt is near"

    def _equal(self, words: str) -> list[str]:
        return [words] if words in self.by_words else []

    def _cut(self, words: str) -> list[str]:
        return [known for known in self.by_words if known.startswith(words)] if len(words) >= _LEAST else []

    def _inside(self, words: str) -> list[str]:
        found = [known for known in self.by_words if len(known) >= _LEAST and f"-{known}-" in f"-{words}-"]
        return [known for known in found if not any(known in other for other in found if other != known)]

    def _choose(self, words: str, by: str, off: Sequence[str]) -> _Match:
        """The video among those with this prompt, by the words behind it in the file's name."""
        group = self.by_words[words]
        sample, seed = _counts(off)
        if seed is not None and [one.seed for one in group].count(seed) == 1:
            return _Match(next(one for one in group if one.seed == seed), by)
        if len(group) == 1:
            return _Match(group[0], by, sample)
        if len({one.prompt for one in group}) == 1 and sample is not None and sample < len(group):
            return _Match(group[sample], by)
        options = ", ".join(one.name for one in group[:3])
        raise _Refused(f"{len(group)} videos have this prompt: {options}", ambiguous=True)

    def _numbered(self, number: int) -> _Match:
        if not self.numbered:
            raise _Refused("a number alone: numbers need a file of prompts, whose order they follow")
        if self.first is None:
            raise _Refused("a number alone, and none of 0 or the last: say --first 0 or --first 1")
        place = number - self.first
        if not 0 <= place < len(self.names):
            raise _Refused(f"number {number} of {len(self.names)} prompts, the first of which is {self.first}")
        return _Match(self.names[place], "number")


def _spellings(stem: str) -> list[tuple[str, list[str]]]:
    """What a file's name may be of a prompt's words, and the words behind that are taken off; whole names first."""
    words, found = words_of(stem).split("-"), list[tuple[str, list[str]]]()
    for start in [words, *([words[1:]] if len(words) > 1 and words[0].isdigit() else [])]:
        rest, off = list(start), list[str]()
        while rest:
            found.append(("-".join(rest), list(off)))
            if not _APPENDED.fullmatch(rest[-1]):
                break
            off.insert(0, rest.pop())
    return found


def _counts(off: Sequence[str]) -> tuple[int | None, int | None]:
    """The sample and the seed that the words behind a prompt tell: the first number, and the one after "seed"."""
    text = "-".join(off)
    seed = re.search(r"(?:^|-)seed-?(\d+)", text)
    numbers = re.findall(r"(?:^|(?<=-))(?:sample-?)?(\d{1,4})(?=-|$)", text[: seed.start()] if seed else text)
    return (int(numbers[0]) if numbers else None), (int(seed[1]) if seed else None)


def _only_number(stem: str) -> int | None:
    """The number of a file that has no other name, such as 0003.mp4, video-3.mp4 or 3_1088_1920.mp4."""
    words = words_of(stem).split("-")
    if len(words) > 1 and words[0] in _NUMBERED:
        words = words[1:]
    alone = bool(words) and words[0].isdigit() and all(_APPENDED.fullmatch(word) for word in words[1:])
    return int(words[0]) if alone else None


class VideoIngest:
    """Brings folders of videos into `output/METHOD/NAME.mp4`, each with a JSON file that holds its prompt.

    Files are linked or copied, never encoded again. The JSON file is written last and vouches for the video; what is
    there already is left alone, and nothing is overwritten.

    Args:
        output: folder of the methods' folders.
        names: what videos are matched with; None takes the prompts of each folder's table.
        copy: copy files instead of linking to them.
        numbered: see VideoMatcher.
        first: likewise.
        seed: seed in the names of a table's prompts, where there are no names.
    """

    def __init__(
        self,
        output: Path,
        names: Sequence[PromptedName] | None,
        *,
        copy: bool = False,
        numbered: bool = True,
        first: int | None = None,
        seed: int = 0,
    ) -> None:
        self.output, self.names, self.copy = output, names, copy
        self.numbered, self.first, self.seed = numbered, first, seed
        self.hashes = FileHashes(output)

    def bring(self, method: str, folder: Path, table: Path | None = None) -> Ingested:
        """Bring in one method's folder.

        Args:
            method: its name.
            folder: its videos.
            table: CSV or JSONL with the columns file and prompt.

        Raises:
            FileNotFoundError: a folder or table is missing, or a folder holds no video.
            ValueError: an unreadable table, or a video that is there but another.
        """
        done = Ingested()
        texts = None if table is None else read_prompts(table)
        names = self.names
        if names is None:
            assert texts is not None
            names = [PromptedName(PromptLine(t).video_name(self.seed), t) for t in dict.fromkeys(texts.values())]
        matcher = VideoMatcher(names, self.numbered, self.first)
        files = {video_name(path): path for path in find_videos(folder, pictures=True)}
        matcher.begin(list(files))
        matches: dict[str, _Match] = {}
        for stem, path in files.items():
            try:
                if texts is not None and stem not in texts:
                    raise _Refused(f"not in {table}")
                matches[stem] = matcher.match(stem) if texts is None else matcher.of_prompt(texts[stem], stem)
            except _Refused as refused:
                (done.ambiguous if refused.ambiguous else done.unmatched).append((path.name, str(refused)))
        done.unmatched += [(f"{stem} of {table}", "no such video") for stem in (texts or {}) if stem not in files]
        wanted = self._targets(matches, files, done)
        brought = {
            matches[stem].name.name
            for target, stem in wanted.items()
            if self._put(method, files[stem], target, matches[stem], done)
        }
        done.missing = sorted({one.name for one in names} - brought)
        return done

    def _targets(self, matches: Mapping[str, _Match], files: Mapping[str, Path], done: Ingested) -> dict[str, str]:
        """File name in the output, without suffix, to name in the folder; those of one name are ambiguous."""
        base = min((match.sample for match in matches.values() if match.sample is not None), default=0)
        found: dict[str, list[str]] = defaultdict(list)
        for stem, match in matches.items():
            more = "" if match.sample in (None, base) else f"-sample{match.sample}"
            found[match.name.name + more].append(stem)
        for target, stems in found.items():
            if len(stems) > 1:
                others = ", ".join(files[stem].name for stem in stems[:3])
                done.ambiguous += [
                    (files[stem].name, f"{len(stems)} files are of {target}: {others}") for stem in stems
                ]
        return {target: stems[0] for target, stems in found.items() if len(stems) == 1}

    def _put(self, method: str, source: Path, target: str, match: _Match, done: Ingested) -> bool:
        """Bring in one file, unless it is there; False where it cannot be read."""
        video = self.output / method / f"{target}{source.suffix}"
        about = find_json(video.with_suffix(".json"))
        own = {"file": str(source.resolve()), "sha256": self.hashes.digest(source), "matched": match.by}
        was = about.get("source")
        there = (
            isinstance(was, dict) and was.get("sha256") == own["sha256"] and about.get("prompt") == match.name.prompt
        )
        if there and video.is_file() and self.hashes.digest(video) == own["sha256"]:
            done.there += 1
            return True
        if about and not there:
            raise ValueError(
                f"{video.with_suffix('.json')}: is of another video or prompt; nothing is overwritten: remove it, or "
                "choose another --output"
            )
        try:
            info = probe_clip(source)
        except ClipError as error:
            done.unreadable.append((source.name, error.reason))
            return False
        self._place(source, video, str(own["sha256"]))
        shape = {"frames": info.frames, "height": info.height, "width": info.width}
        content = {"prompt": match.name.prompt, "fps": info.fps, "method": method, **shape, "source": own}
        write_text(video.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        done.made += 1
        return True

    def _place(self, source: Path, video: Path, digest: str) -> None:
        """Link or copy a file."""
        if video.is_symlink() and not video.exists():
            video.unlink()  # a link into the void holds nothing
        if video.exists():
            if self.hashes.digest(video) != digest:
                raise ValueError(
                    f"{video}: is another video; nothing is overwritten: remove it, or choose another --output"
                )
            return
        video.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            video.symlink_to(source.resolve())
            return
        with replacing(video) as temporary:
            shutil.copyfile(source, temporary)
