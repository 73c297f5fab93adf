"""Write the generated parts of README.md and of docs/ anew: `python tools/docs.py`, or `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.append(str(ROOT / "benchmarks"))

import card_tables  # noqa: E402
import result_tables  # noqa: E402
from config_page import config_page  # noqa: E402
from config_schema import config_schema  # noqa: E402
from contraction_table import contraction_table  # noqa: E402
from theory_tables import TABLES  # noqa: E402
from wire_sizes import size_table  # noqa: E402

from fedhl.methods.catalogue import markdown  # noqa: E402


def replaced(page: str, name: str, text: str) -> str:
    """The page with `text` between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def with_methods(page: str) -> str:
    """docs/methods.md with the tables of the methods and weightings."""
    return replaced(page, "table", markdown())


def with_sizes(page: str) -> str:
    """docs/wire.md with the sizes of messages."""
    return replaced(page, "sizes", size_table())


def with_contraction(page: str) -> str:
    """docs/maths.md with the errors of clients that remember, and their bounds."""
    return replaced(page, "contraction", contraction_table())


def with_theory(page: str) -> str:
    """docs/theory.md with what the laboratory measured."""
    for name, table in TABLES.items():
        page = replaced(page, name, table())
    return page


def with_results(page: str) -> str:
    """docs/results.md with the tables of the comparisons."""
    for name, table in result_tables.tables().items():
        page = replaced(page, name, table)
    return page


def with_card(page: str) -> str:
    """README.md or docs/performance.md with the results of a graphics card."""
    return card_tables.written(page, card_tables.results())


PAGES: dict[str, Callable[[str], str]] = {
    "docs/config.md": lambda page: config_page(),
    "docs/config.schema.json": lambda page: config_schema(),
    "docs/maths.md": with_contraction,
    "docs/methods.md": with_methods,
    "docs/results.md": with_results,
    "docs/theory.md": with_theory,
    "docs/wire.md": with_sizes,
    **dict.fromkeys(card_tables.PAGES, with_card),
}
"""Every page that is written in part or as a whole: name -> the page of now from the page as it is."""


if __name__ == "__main__":
    for name, anew in PAGES.items():
        file = ROOT / name
        file.write_text(anew(file.read_text(encoding="utf-8")), encoding="utf-8")
