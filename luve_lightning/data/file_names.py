"""Names that users give: which can become files, and when two are the same."""

from __future__ import annotations

import unicodedata
from pathlib import Path

NAME_BYTES = 255  # of a file's name, on nearly every file system
_LONGEST_SUFFIX = 16  # of what is made of a name that a user gives: -differences.csv


def check_name(name: str, what: str, signs: str = " _.+-") -> None:
    """Refuse a name of a user's that cannot become a file or a folder inside the one it belongs to.

    Args:
        name: letters, digits and marks of any script, and some signs.
        what: the option or the place, for the message.
        signs: which; a name begins with none of space, "." and "-".

    Raises:
        ValueError: with what would be right.
    """
    plain = all(unicodedata.category(sign)[0] in "LMN" or sign in signs for sign in name)
    if not name or not plain or name[0] in " .-" or unicodedata.category(name[0])[0] == "M":
        shown = " ".join(signs.replace(" ", ""))
        raise ValueError(
            f"{what} {name!r}: expected letters, digits, spaces and {shown}, a letter or digit first"
        )
    size, most = len(name.encode()), NAME_BYTES - _LONGEST_SUFFIX
    if size > most:
        raise ValueError(
            f"{what} {name[:12]!r}...: {size} bytes are too long for a file name, at most {most} fit "
            "(a letter takes 1 to 4)"
        )


def video_name(path: str | Path) -> str:
    """The name by which a video is matched: its file's without suffix, accents composed (NFC).

    File systems differ in how they keep accents; a name copied from one to another must stay the same name.
    """
    return unicodedata.normalize("NFC", Path(path).stem)
