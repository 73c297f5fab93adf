"""Rows as they are read, and single fields of them."""

from __future__ import annotations

from typing import Any

from fedhl.errors import UserError
from fedhl.names import meant

Rows = list[dict[str, Any]]


def column(rows: Rows, field: str, source: str) -> list[Any]:
    """The values of one field, a value for every row.

    Raises UserError naming the first row without the field, or with null in it.
    """
    for index, row in enumerate(rows):
        if field not in row:
            raise UserError(
                f"{source}: row {index} (counted from 0) has no field {field!r}"
                f"{meant(field, row)}; its fields: {', '.join(map(str, row)) or 'none'}"
            )
        if row[field] is None:
            raise UserError(
                f"{source}: field {field!r} is empty in row {index} (counted from 0); "
                "fill it in or remove the row"
            )
    return [row[field] for row in rows]


def text_column(rows: Rows, field: str, source: str) -> list[str]:
    """The texts of one field. Raises UserError as `column` does, and for a value that is no text."""
    values = column(rows, field, source)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(
                f"{source}: field {field!r} of row {row} (counted from 0) is "
                f"{type(value).__name__} {value!r:.60}, expected text"
            )
    return values
