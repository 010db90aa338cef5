"""Writes environment.yml (conda) from pyproject.toml, so that dependencies are named in one place.

    python tools/make_environment.py            write the file
    python tools/make_environment.py --check    exit with 1 when the file is out of step

Conda brings Python and pip. The packages come from PyPI through pip with the same ranges as everywhere else:
decord and clean-fid are on no conda channel for every platform, and torch must match torchvision to the minor.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "environment.yml"


def render(pyproject: Path) -> str:
    """The text of environment.yml for a pyproject.toml.

    Args:
        pyproject: Path of the pyproject.toml.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    lines = [
        "# Written by tools/make_environment.py from pyproject.toml; edit that file, then run the tool.",
        "#   conda env create -f environment.yml && conda activate luve-lightning",
        f"name: {project['name']}",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        f"  - python={project['requires-python'].removeprefix('>=')}  # what constraints.txt was tested with",
        "  - pip",
        "  - make",
        "  - pip:",
        "      - --constraint constraints.txt",
        *(f'      - "{requirement}"' for requirement in requirements),
        "      - --editable .",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(arguments).check
    text = render(ROOT / "pyproject.toml")
    if not check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.name} is out of step with pyproject.toml; run: python tools/make_environment.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
