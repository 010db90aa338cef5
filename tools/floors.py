"""Prints the lowest versions that pyproject.toml allows, as pins for pip: what `make test-floors` installs.

    python tools/floors.py > floors.txt && pip install --requirement floors.txt

`torch>=2.11,<2.13` becomes `torch==2.11`. Only what pyproject.toml names is pinned; pip chooses the rest.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[^\]]*\])?")
_FLOOR = re.compile(r"(?:>=|==|~=)\s*([0-9][^,;\s]*)")


def pins(pyproject: Path) -> list[str]:
    """The pins of a pyproject.toml: its dependencies and those of `dev` and `docs`, in order, each once.

    Args:
        pyproject: Path of the pyproject.toml.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    return list(dict.fromkeys(_pin(requirement) for requirement in requirements))


def _pin(requirement: str) -> str:
    name, floor = _NAME.match(requirement), _FLOOR.search(requirement)
    if name is None or floor is None:
        raise ValueError(f"{requirement!r}: expected a lower bound such as >=1.2")
    marker = requirement[requirement.index(";") :] if ";" in requirement else ""
    return f"{name.group()}=={floor.group(1)}{marker}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the pins; returns the exit code."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args(arguments)
    try:
        print("\n".join(pins(PYPROJECT)))
    except ValueError as error:
        print(f"{PYPROJECT.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
