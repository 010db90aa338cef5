"""Pages of one file."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from pathlib import Path

import pytest

from luve_lightning.reporting.document import data_uri, render_document


def page() -> str:
    context = {
        "title": "<script>x</script>", "raters": 2, "trials": 1, "axes": {"a": "b?"}, "positions": "AB",
        "columns": 2, "data": "{}",
    }  # fmt: skip
    return render_document("study.html", ("base.css", "study.css"), ("study.js",), context)


@pytest.mark.parametrize("tag", ["style", "script"])
def test_the_policy_names_the_hash_of_what_is_in_the_page(tag: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page())
    assert policy
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert (
        f"{tag}-src &#39;sha256-{digest}&#39;;" in policy[1] or f"{tag}-src 'sha256-{digest}';" in policy[1]
    )


def test_text_is_escaped() -> None:
    assert "<title>&lt;script&gt;x&lt;/script&gt;</title>" in page()


def test_a_data_address_holds_the_bytes() -> None:
    assert data_uri(b"\x00\xff", "image/webp") == "data:image/webp;base64,AP8="


def test_an_installed_package_has_every_template(repository: Path) -> None:
    """setuptools takes no files but Python's unless pyproject.toml names them."""
    listed = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = repository / "luve_lightning"
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix in (".html", ".css", ".js")}
    assert len(others) >= 8
    found = {
        path
        for name, patterns in listed.items()
        for pattern in patterns
        for path in (repository / name.replace(".", "/")).glob(pattern)
    }
    assert others <= found
