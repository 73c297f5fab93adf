"""Names of classes, and their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhl.errors import UserError
from fedhl.names import one_line


def label_ids(
    values: Sequence[Any], known: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """Class ids of label values, and the label names that the ids index.

    A name is `str(value)`; names that are all integers sort as numbers. With `known`, ids index
    that list instead.

    Raises UserError for a label that is not in `known`, is empty or is no class, and for data
    with a single label.
    """
    names = label_names(values)
    if known is None:
        known = sorted_labels(set(names))
        if len(known) < 2:
            raise UserError(f"all {len(names)} rows have the same label {known}; need two or more")
    index = {name: i for i, name in enumerate(known)}
    for row, name in enumerate(names):
        if name not in index:
            raise UserError(
                f"row {row} (counted from 0) has label {name!r}, which was not in training; "
                f"known labels: {', '.join(known)}"
            )
    return [index[name] for name in names], list(known)


def named_labels(
    values: Sequence[Any], source: str, known: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """`label_ids`, with the source in its errors."""
    try:
        return label_ids(values, known)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def label_names(values: Sequence[Any]) -> list[str]:
    """The name of each label value. Raises UserError for one that is empty or no class."""
    return [_label_name(value, row) for row, value in enumerate(values)]


def sorted_labels(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def _label_name(value: Any, row: int) -> str:
    if value is None or (isinstance(value, float) and not value.is_integer()):
        raise UserError(
            f"row {row} (counted from 0): {value!r} is no class label; "
            "expected a name or a whole number"
        )
    if isinstance(value, (list, dict)):
        raise UserError(f"row {row} (counted from 0): one label expected, got {value!r:.60}")
    name = str(int(value)) if isinstance(value, float) else str(value)
    if not one_line(name):
        raise UserError(
            f"row {row} (counted from 0): the label {name!r:.60} has a control character or a line break; "
            "clean the data"
        )
    return name
