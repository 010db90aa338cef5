"""Where the parts of a backbone come from, and one line when they cannot be had."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # organisation/name


def is_local(backbone: str | Path) -> bool:
    """Whether a backbone is a folder here; otherwise it has the form of a hub id.

    Raises:
        FileNotFoundError: when it is neither.
    """
    local = Path(backbone).is_dir()
    if not local and not _HUB_ID.fullmatch(str(backbone)):
        raise FileNotFoundError(
            f"backbone {backbone}: no such folder; expected a diffusers pipeline folder or a hub id"
        )
    return local


def cannot_load(backbone: str | Path, part: str, error: OSError) -> FileNotFoundError:
    """What to raise when diffusers or transformers could not load a backbone's subfolder."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = "no such folder, and its {}/ cannot be had from the hub"
    if Path(backbone).is_dir():
        where = "cannot load its {}/"
    return FileNotFoundError(f"backbone {backbone}: {where.format(part)}: {reason}")
