"""Parts of the report's page: charts and templates, what each input was made from, and which were left out."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from luve_lightning.data.clip_container import ClipError
from luve_lightning.files import read_json

Part = TypeVar("Part")
Input = TypeVar("Input")


@dataclass(frozen=True)
class LeftOut:
    """One input that is not on the page, or not all of it.

    Attributes:
        key: key in the configuration, such as `results.experts`.
        path: path that it names.
        reason: `missing`, why it is unreadable, or that it is too large.
    """

    key: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.path}: {self.reason}"


class Unreadable(ValueError):
    """An existing input with unexpected content; the message does not name it."""


@dataclass
class Inputs:
    """Reads inputs by name and records those that cannot be read.

    Attributes:
        left_out: missing inputs, in the order of reading.
    """

    left_out: list[LeftOut] = field(default_factory=list)

    def read(
        self,
        kind: str,
        inputs: Mapping[str, Input | None],
        reader: Callable[[str, Input], Part],
        where: Callable[[Input], object] = str,
    ) -> list[Part]:
        """The result of `reader(name, input)` for each input; null ones are skipped, bad ones recorded.

        Args:
            kind: first part of their keys.
            inputs: by name.
            reader: reads one.
            where: returns what an input names.
        """
        given = [(name, value) for name, value in inputs.items() if value is not None]
        found = [self.attempt(f"{kind}.{n}", where(value), partial(reader, n, value)) for n, value in given]
        return [part for part in found if part is not None]

    def attempt(self, key: str, path: object, read: Callable[[], Part]) -> Part | None:
        """The result of `read()`, or None after recording why there is none."""
        try:
            return read()
        except FileNotFoundError as error:
            self.note(key, path, str(error) if "missing" in str(error) else "missing")
        except ClipError as error:
            self.note(key, path, error.reason or str(error))
        except (OSError, UnicodeDecodeError) as error:
            self.note(key, path, f"cannot be read: {error}")
        except ValueError as error:
            self.note(key, path, str(error))
        return None

    def note(self, key: str, path: object, reason: str) -> None:
        """Add a line."""
        self.left_out.append(LeftOut(key, str(path), " ".join(reason.split())))


_DIGITS = 12  # digits of a hash, as in its folder's name
_STAGE_COLUMNS = ("row", "seed", "name", "hash", "seconds")
# Other packages are in the JSON file itself; these affect the numbers.
_PACKAGES = ("torch", "lightning", "diffusers", "peft", "transformers", "torchmetrics", "numpy", "luve-lightning")


@dataclass(frozen=True)
class Origin:
    """What is known about one input.

    Attributes:
        key: key in the configuration.
        source: file that says so.
        facts: facts in words, by name.
        stages: stages of an ablation table, by _STAGE_COLUMNS.
    """

    key: str
    source: str
    facts: dict[str, str]
    stages: tuple[tuple[str, ...], ...] = ()

    @property
    def stage_columns(self) -> tuple[str, ...]:
        """Column headings of `stages`."""
        return _STAGE_COLUMNS


def of_results(key: str, path: Path, content: Mapping[str, Any]) -> Origin:
    """Provenance of an ablation table, from the JSON file beside it."""
    facts = {
        name: in_words(content[name])
        for name in ("world", "revision", "device", "date", "seeds", "settings", "command")
        if content.get(name) not in (None, "", [], {})
    }
    facts |= _packages(content.get("packages"))
    stages = content.get("stages")
    lines = [
        tuple(_cell(column, stage.get(column)) for column in _STAGE_COLUMNS)
        for stage in (stages if isinstance(stages, list) else [])
        if isinstance(stage, Mapping)
    ]
    return Origin(key, str(path), facts, tuple(lines))


def of_run(key: str, folder: Path) -> Origin | None:
    """Provenance of a training run, from the newest `provenance*.json` of its folder; None without one.

    Raises:
        ValueError: the file is not a JSON object.
    """
    files = sorted(folder.glob("provenance*.json"), key=lambda file: (len(file.name), file.name))
    if not files:
        return None
    content = read_json(files[-1])
    facts = {}
    if git := content.get("git"):
        facts["revision"] = in_words(git.get("revision", "")) + " with changes" * bool(git.get("dirty"))
    names = ("device", "started", "command")
    facts |= {name: in_words(content[name]) for name in names if content.get(name) is not None}
    return Origin(key, str(files[-1]), facts | _packages(content.get("packages")))


def in_words(value: Any) -> str:
    """A value of a JSON file in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(inside)}" for name, inside in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(in_words(inside) for inside in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _packages(packages: Any) -> dict[str, str]:
    if not isinstance(packages, Mapping):
        return {}
    chosen = {name: version for name, version in packages.items() if name.lower() in _PACKAGES}
    return {"packages": in_words(chosen or packages)}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return text[:_DIGITS] if column == "hash" else text


def render_document(
    template: str, styles: Sequence[str], scripts: Sequence[str], context: Mapping[str, Any], media: str = "data:"
) -> str:
    """Render a page that includes its styles and scripts.

    A content security policy in the page allows only these styles and scripts, known by their hashes, and nothing
    over a network, whatever a caption or a table may hold.

    Args:
        template: file in the folder `templates`; it extends `document.html`.
        styles: CSS files in it.
        scripts: JavaScript files in it.
        context: values for the template; text in it is escaped. `chart.html` needs `number`, which writes a value.
        media: allowed sources of videos, in the words of a content security policy.
    """
    environment = Environment(
        loader=PackageLoader("luve_lightning.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_joined(environment, names) for names in (styles, scripts))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        f"media-src {media}; base-uri 'none'; form-action 'none'"
    )
    given = {"policy": policy, "style": style, "script": script}
    return environment.get_template(template).render(given | dict(context))


def data_uri(content: bytes, kind: str) -> str:
    """A file's bytes as a data URI of a media type such as `image/webp`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _joined(environment: Environment, names: Sequence[str]) -> str:
    assert environment.loader is not None
    parts = [environment.loader.get_source(environment, name)[0].strip() for name in names]
    return "\n" + "\n".join(parts) + "\n"


def _hash(text: str) -> str:
    """A hash in the form for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


COLOURS = 6
_POINTS = 300
_LOG_FROM = 30.0  # values that differ by more than this factor get a logarithmic axis
_WIDTH, _HEIGHT = 420, 260  # points
# matplotlib draws in these; the page replaces them by its style sheet's variables, light or dark.
_INK, _FAINT, _GRID = "#0000f0", "#0000f1", "#0000f2"
_LINES = tuple(f"#0000e{number}" for number in range(COLOURS))
_VARIABLES = {_INK: "ink", _FAINT: "faint", _GRID: "line"} | {c: f"s{n}" for n, c in enumerate(_LINES)}
_DASHES = ("-", "--", ":")  # like `.swatch` of base.css


@dataclass(frozen=True)
class Series:
    """One line: `x` ascending, `y` finite, equally many."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @property
    def averaged(self) -> int:
        """Number of neighbouring values averaged into a drawn point."""
        return -(-len(self.x) // _POINTS)

    def drawn(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The drawn points, at most 300; a single one twice, which draws it as a dot."""
        starts = np.arange(0, len(self.x), self.averaged)
        counts = np.diff(np.append(starts, len(self.x)))
        x, y = (np.add.reduceat(values, starts) / counts for values in (self.x, self.y))
        return (x, y) if len(x) > 1 else (x.repeat(2), y.repeat(2))


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, named in the legend."""

    name: str
    x: float


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: heading and accessible name.
        x_label: label below the axis.
        y_label: label above the legend.
        series: at least one, each with a point.
        marks: vertical lines.
        y_range: lower and upper end of the axis; default from the values.
        logarithmic: None uses a logarithmic axis where the values are all positive and differ by more than a
            factor of 30.

    Raises:
        ValueError: no line, or a line without points, with values that are not finite or of another number than x.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Mark] = ()
    y_range: tuple[float, float] | None = None
    logarithmic: bool | None = None

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError(f"{self.title}: nothing to draw")
        for line in self.series:
            if not len(line.x) or line.x.shape != line.y.shape or not np.isfinite([line.x, line.y]).all():
                raise ValueError(f"{self.title}: {line.name}: expected equally many finite x and y, at least one")

    @property
    def scale(self) -> str:
        """Scale of the y axis: "log" or "linear"."""
        low, high = self.y_range or (
            min(line.y.min() for line in self.series), max(line.y.max() for line in self.series)
        )  # fmt: skip
        far = low > 0 and high / low > _LOG_FROM if self.logarithmic is None else self.logarithmic
        return "log" if far else "linear"

    @cached_property
    def svg(self) -> str:
        """The picture as an element for a page with base.css."""
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter

        target = io.StringIO()
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.fonttype": "none"}):
            figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
            axes = figure.add_subplot()
            axes.set_yscale(self.scale)
            for number, line in enumerate(self.series):
                x, y = line.drawn()
                axes.plot(
                    x,
                    y if self.y_range is None else np.clip(y, *self.y_range),
                    color=_LINES[number % COLOURS],
                    linestyle=_DASHES[number % len(_DASHES)] if len(line.x) > 1 else "-",
                    linewidth=1.8 if len(line.x) > 1 else 7,
                    solid_capstyle="round",
                    clip_on=False,
                )
            for number, mark in enumerate(self.marks):
                axes.axvline(mark.x, color=_INK, linewidth=1.2, linestyle=_DASHES[1 + number % 2], clip_on=False)
            if self.y_range is not None:
                axes.set_ylim(*self.y_range)
            if self.scale == "log":
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_formatter(NullFormatter())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.margins(x=0.01)
            axes.set_xlabel(self.x_label, color=_FAINT, fontsize=11)
            axes.grid(axis="y", color=_GRID, linewidth=0.6, clip_on=False)
            axes.tick_params(which="both", length=0, labelcolor=_FAINT, labelsize=11)
            axes.spines[["top", "left", "right"]].set_visible(False)
            axes.spines["bottom"].set_color(_FAINT)
            figure.savefig(target, format="svg", transparent=True)
        return _inline(target.getvalue())


def _inline(svg: str) -> str:
    """An SVG by matplotlib as an element: the page's font and colours, without styles, which its policy forbids."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|<defs>.*?</defs>", "", element, flags=re.DOTALL)
    element = re.sub(r' (?:id|width|height|version|transform|xmlns:xlink)="[^"]*"', "", element)
    element = re.sub(r' style="([^"]*)"', lambda found: _attributes(found[1]), element)
    # A tenth of a point is less than a pixel; the numbers beside the axes are not in attributes.
    element = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), element)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, f"var(--{variable})")
    return " ".join(re.sub(r"<g/>|</?g>", "", element).split())


def _attributes(style: str) -> str:
    given = dict(part.strip().split(": ", 1) for part in style.split(";"))
    return "".join(f' {name}="{value}"' for name, value in given.items() if name != "font-family")
