"""What the pages share: one base template with the styles, figures set into the page, nothing that is loaded."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **content: Any) -> str:
    """The page of a template in `templates/`; every text is escaped, and a name that is missing is an error."""
    return _environment().get_template(template).render(**content)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dpmed.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def inline_svg(svg: str, name: str) -> Markup:
    """A figure for the page: own ids (two figures may both have `clip0`), scaled to the page's width."""
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title"', 1))
