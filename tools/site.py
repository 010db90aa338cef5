"""What mkdocs.yml cannot say: READMEs as pages, links into the repository, and a page of API reference per package.

mkdocs loads this file as a hook. Pages are read from the files that GitHub shows, so nothing is written twice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "luve_lightning"
# The page of the site for each of these files of the repository.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/mini/README.md": "mini-world.md",
    "comfyui/README.md": "comfyui.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def rooms() -> dict[str, list[str]]:
    """The modules that each page of the API reference shows, by the page's name."""
    folders = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    pages = {folder.name: [f"luve_lightning.{folder.name}"] for folder in folders}
    alone = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    return {**pages, "modules": [f"luve_lightning.{name}" for name in alone]}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API reference to the navigation."""
    assert config.nav is not None
    config.nav.append({"API reference": [f"api/{room}.md" for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the READMEs and the API reference."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for room, modules in rooms().items():
        body = "\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{room}.md", content=f"# {room}\n\n{body}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the site's pages; a link to another file of the repository becomes that file's path."""
    sources = {page: source for source, page in PAGES.items()}
    source = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda match: _link(match, source, page.file.src_uri), markdown)


def _link(match: re.Match[str], source: Path, page: str) -> str:
    picture, text, target, anchor = match.groups()
    if not target or "://" in target:
        return match.group()
    path = (source.parent / target).resolve()
    if not path.exists():
        raise PluginError(f"{source.relative_to(ROOT)}: {target} does not exist")
    name = path.relative_to(ROOT).as_posix()
    if name not in PAGES and not name.startswith("docs/"):
        return f"{text} (`{name}`)" if text != f"`{name}`" else text
    site = PAGES.get(name, name.removeprefix("docs/"))
    return f"{picture}[{text}]({os.path.relpath(site, Path(page).parent)}{anchor or ''})"
