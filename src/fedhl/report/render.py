"""From the values of a page and its template to one file of HTML.

All values in a template are escaped, since they come from files that others may have written. A name that a
template uses without a value is an error.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedhl.names import plural, size
from fedhl.report import plots
from fedhl.report.colours import variables
from fedhl.report.format import (
    amount,
    difference_text,
    general,
    percent,
    seconds,
    shortest,
    spread_text,
    three_decimals,
)
from fedhl.report.plots import Draw

View = dict[str, Any]
"""The values of a template: plain values, and plots as SVG."""

WIDE, NARROW = 520, 340  # widths at which every plot is drawn; the style sheet shows one of them


def sha256(text: str) -> str:
    """The digest by which the content security policy of a page knows its script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


TEMPLATES = Environment(
    loader=PackageLoader("fedhl.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
FORMATS = (
    *(general, shortest, three_decimals, amount, percent, size, seconds, plural),
    *(spread_text, difference_text),
)
"""Templates call these by their names."""

TEMPLATES.filters["sha256"] = sha256
TEMPLATES.globals["colours"] = {scheme: variables(scheme) for scheme in ("light", "dark")}
TEMPLATES.globals.update({show.__name__: show for show in FORMATS})


def render(template: str, view: Mapping[str, Any]) -> str:
    return TEMPLATES.get_template(template).render(view) + "\n"


def plot(name: str, title: str, draw: Draw, height: int = 250) -> View:
    """A plot at both widths; its name makes the ids inside unique on the page."""
    wide, narrow = plots.svgs(draw, (WIDE, NARROW), height, name, title)
    return {"wide": Markup(wide), "narrow": Markup(narrow)}


def figure(name: str, title: str, draw: Draw, width: int, height: int) -> Markup:
    """A plot as it stands in the page: Matplotlib has escaped its texts."""
    return Markup(*plots.svgs(draw, [width], height, name, title))
