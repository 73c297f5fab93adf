"""Rows as they are read, single fields of them, and mistakes in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from reprlib import Repr
from typing import Any

from fedhl.errors import UserError
from fedhl.names import listed, meant, plural

Rows = list[dict[str, Any]]

DEEPEST = 50
"""A value that is nested more deeply is no data of a text model; Python cannot walk through any depth."""


class Row(dict[str, Any]):
    """A row that knows its place in its source: its number, counted from 0, and its first line in a text
    file."""

    __slots__ = ("line", "number")

    def __init__(self, fields: Any = (), number: int = 0, line: int | None = None) -> None:
        super().__init__(fields)
        self.number, self.line = number, line


class RowError(UserError):
    """A mistake in rows: `rows` are their positions in what was looked at, `said` is what is wrong with the
    first of them. `located` turns it into a message with the source and the places there."""

    def __init__(self, rows: int | Sequence[int], said: str) -> None:
        self.rows = [rows] if isinstance(rows, int) else list(rows)
        self.said = said
        super().__init__(self.told([], ""))

    def told(self, rows: Rows, source: str) -> str:
        begin = f"{source}: " if source else ""
        if not self.rows:
            return f"{begin}{self.said}"
        first, *others = self.rows
        more = ""
        if others:
            where = listed(short_place(rows, k) for k in others)
            are = "is" if len(others) == 1 else "are"
            more = f" ({plural(len(others), 'further row')} {are} wrong in this way: {where})"
        return f"{begin}{place(rows, first)}: {self.said}{more}"


@contextmanager
def located(rows: Rows, source: str) -> Iterator[None]:
    """Inside the block a mistake in one of `rows` is told with its place in the source."""
    try:
        yield
    except RowError as error:
        raise UserError(error.told(rows, source)) from None


def refuse(problems: Iterable[tuple[int, str]]) -> None:
    """Raises RowError if there is a problem: a row, and what is wrong with it."""
    found = list(problems)
    if found:
        raise RowError([row for row, _ in found], found[0][1])


def place(rows: Rows, index: int) -> str:
    """The place of `rows[index]` in its source, for a message."""
    row = rows[index] if index < len(rows) else None
    if not isinstance(row, Row):
        return f"row {index} (counted from 0)"
    line = "" if row.line is None else f", line {row.line}"
    return f"row {row.number} (counted from 0{line})"


def short_place(rows: Rows, index: int) -> str:
    row = rows[index] if index < len(rows) else None
    if not isinstance(row, Row):
        return f"row {index}"
    return f"row {row.number}" if row.line is None else f"line {row.line}"


def column(rows: Rows, field: str, source: str) -> list[Any]:
    """The values of one field, a value for every row.

    Raises UserError naming the first rows without the field, with null in it, or with a value that is no
    data.
    """
    with located(rows, source):
        refuse(
            (
                index,
                f"the row has no field {field!r}{meant(field, row)}; its fields: {listed(row) or 'none'}",
            )
            for index, row in enumerate(rows)
            if field not in row
        )
        refuse(
            (index, f"field {field!r} is empty; fill it in or remove the row")
            for index, row in enumerate(rows)
            if row[field] is None
        )
        refuse(
            (index, f"field {field!r} {flaw}")
            for index, row in enumerate(rows)
            if (flaw := flaw_of(row[field]))
        )
    return [row[field] for row in rows]


def text_column(rows: Rows, field: str, source: str) -> list[str]:
    """The texts of one field. Raises UserError as `column` does, and for a value that is no text."""
    values = column(rows, field, source)
    with located(rows, source):
        refuse(
            (row, f"field {field!r} is {type(value).__name__} {shown(value)}, expected text")
            for row, value in enumerate(values)
            if not isinstance(value, str)
        )
    return values


def flaw_of(value: Any) -> str:
    """Why no model can read this value; "" if nothing is wrong with it."""
    level = [value]
    for _ in range(DEEPEST):
        for text in (x for x in level if isinstance(x, str)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                code = ord(text[error.start])
                return (
                    f"has half of a surrogate pair (\\u{code:04x}) as character {error.start + 1}, which "
                    "is no Unicode text; write the character whole, or leave it out"
                )
        inner = [x for x in level if isinstance(x, dict | list | tuple)]
        if not inner:
            return ""
        level = [y for x in inner for y in ([*x, *x.values()] if isinstance(x, dict) else x)]
    return f"is nested more than {DEEPEST} levels deep; expected a text, or a list of messages"


def shown(value: object) -> str:
    """A value in a message, in at most about 60 characters."""
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 60
    return brief.repr(value)
