r"""Runs a command in a terminal of 80x24 and draws what the terminal shows, for the documentation.

    python tools/terminal_picture.py --at 'step 1[1-3]\d\d/' docs/train-vluer-running.png \
        --end docs/train-vluer-finished.png -- make train-vluer

Each --at PATTERN FILE draws the screen when the regular expression first matches it; --end FILE draws it when the
command has ended. The exit status is the command's, or 1 when a pattern was never seen.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_BACKGROUND: Colour = (24, 26, 31)
_PLAIN: Colour = (216, 219, 226)
_COLOURS: dict[str, Colour] = {
    "black": (92, 99, 112), "red": (224, 108, 117), "green": (152, 195, 121), "brown": (229, 192, 123),
    "blue": (97, 175, 239), "magenta": (198, 120, 221), "cyan": (86, 182, 194), "white": _PLAIN,
}  # fmt: skip
_MARGIN = 16


class Terminal:
    """A command in a pseudo-terminal, and the screen that it writes to.

    Args:
        command: program and arguments.
        columns: width of the screen.
        lines: its height.
        environment: variables in addition to this process's own.
        folder: folder where the command runs; None: here.
    """

    def __init__(
        self,
        command: Sequence[str],
        columns: int = 80,
        lines: int = 24,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.status: int | None = None
        variables = {**os.environ, **(environment or {}), "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            variables.pop(name, None)
        self.process, self._master = pty.fork()
        if self.process == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
                # A shell ignores Ctrl-C for what it starts in the background, and children inherit that.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                if folder is not None:
                    os.chdir(folder)
                os.execvpe(command[0], list(command), variables)
            finally:
                os._exit(127)

    def resize(self, columns: int) -> None:
        """Make it that wide, as a person who drags its border; the command is told."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", self.screen.lines, columns, 0, 0))
        self.screen.resize(columns=columns)

    def shown(self) -> list[str]:
        """The screen's lines, without spaces at their ends."""
        return [line.rstrip() for line in self.screen.display]

    def everything(self) -> list[str]:
        """What has scrolled out of the screen, then the screen."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return above + self.shown()

    def wait_for(self, seen: Callable[[list[str]], object], seconds: float = 150.0) -> bool:
        """Reads until `seen` holds for the screen; False when the command ends or the time runs out first."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if seen(self.shown()):
                return True
            if not self._read():
                return bool(seen(self.shown()))
        return False

    def finish(self, seconds: float = 150.0) -> int:
        """Reads to the end and returns the exit status.

        Raises:
            TimeoutError: when the command does not end in time; it is killed.
        """
        self.wait_for(lambda lines: False, seconds)
        if self.status is None:
            self.kill()
            raise TimeoutError(f"the command did not end within {seconds:g} s")
        return self.status

    def kill(self) -> None:
        """Ends the command, if it has not ended."""
        if self.status is None:
            os.kill(self.process, signal.SIGKILL)
            self._end()

    def type(self, keys: str) -> None:
        r"""Sends keys; `\x03` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def _read(self) -> bool:
        if self.status is not None:
            return False
        if select.select([self._master], [], [], 0.1)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # how Linux says that the other side is closed
                data = b""
            if not data:
                self._end()
                return False
            self.written += data
            self._stream.feed(data)
        return True

    def _end(self) -> None:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self._master)


def draw(screen: pyte.Screen, size: int = 15) -> Image.Image:
    """A picture of a screen, in the font that matplotlib ships."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(fonts / f"DejaVuSansMono{name}.ttf", size) for name in ("", "-Bold"))
    width, height = round(plain.getlength("M")), round(size * 1.3)
    picture = Image.new("RGB", (screen.columns * width + 2 * _MARGIN, screen.lines * height + 2 * _MARGIN), _BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    for row in range(screen.lines):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            place = (_MARGIN + column * width, _MARGIN + row * height)
            canvas.text(place, cell.data, font=bold if cell.bold else plain, fill=_colour(cell.fg))
    return picture.quantize(64)


def _colour(name: str) -> Colour:
    if re.fullmatch("[0-9a-f]{6}", name):
        red, green, blue = bytes.fromhex(name)
        return red, green, blue
    return _COLOURS.get(name.removeprefix("bright"), _PLAIN)


def main() -> int:
    """Draws what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", nargs=2, action="append", default=[], metavar=("PATTERN", "FILE"))
    parser.add_argument("--end", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=3600.0, help="kill the command after this long")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    wanted = list(arguments.at)
    terminal = Terminal(arguments.command)

    def look(lines: list[str]) -> bool:
        for entry in [entry for entry in wanted if re.search(entry[0], "\n".join(lines))]:
            draw(terminal.screen).save(entry[1], optimize=True)
            wanted.remove(entry)
        return False

    terminal.wait_for(look, arguments.seconds)
    if terminal.status is None:
        terminal.kill()
    if arguments.end:
        draw(terminal.screen).save(arguments.end, optimize=True)
    for pattern, file in wanted:
        sys.stderr.write(f"{file}: {pattern!r} was never on the screen\n")
    return terminal.status or int(bool(wanted))


if __name__ == "__main__":
    sys.exit(main())
