"""Composes a page from Jinja templates: one HTML file that loads nothing from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_document(
    template: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    context: Mapping[str, Any],
    media: str = "data:",
) -> str:
    """Render a page that includes its styles and scripts.

    A content security policy in the page allows only these styles and scripts, known by their hashes, and nothing
    over a network, whatever a caption or a table may hold.

    Args:
        template: file in the folder `templates`; it extends `document.html`.
        styles: CSS files, in order.
        scripts: JavaScript files, in order.
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
    """A file's bytes as a data URI.

    Args:
        content: content of the file.
        kind: its media type, such as `image/webp`.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _joined(environment: Environment, names: Sequence[str]) -> str:
    assert environment.loader is not None
    parts = [environment.loader.get_source(environment, name)[0].strip() for name in names]
    return "\n" + "\n".join(parts) + "\n"


def _hash(text: str) -> str:
    """A hash in the form for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
