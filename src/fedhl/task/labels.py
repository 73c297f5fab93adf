"""Names of classes, and their ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedhl.names import listed, meant, one_line
from fedhl.task.rows import RowError, Rows, located, refuse, shown


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
            raise RowError(
                [], f"all {len(names)} rows have the same label {known}; need two or more"
            )
    index = {name: i for i, name in enumerate(known)}
    refuse(
        (
            row,
            f"the label is {name!r}{meant(name, known)}, which was not in training; known labels: "
            f"{listed(known)}",
        )
        for row, name in enumerate(names)
        if name not in index
    )
    return [index[name] for name in names], list(known)


def named_labels(
    values: Sequence[Any], rows: Rows, source: str, known: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """`label_ids` of the values of these rows, with the source and the row in its errors."""
    with located(rows, source):
        return label_ids(values, known)


def label_names(values: Sequence[Any]) -> list[str]:
    """The name of each label value. Raises UserError for one that is empty or no class."""
    refuse(
        (row, problem) for row, value in enumerate(values) if (problem := problem_of_label(value))
    )
    return [label_name(value) for value in values]


def label_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def sorted_labels(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def problem_of_label(value: Any) -> str:
    """Why this value names no class; "" if it does."""
    if value is None or (isinstance(value, float) and not value.is_integer()):
        return f"{value!r} is no class label; expected a name or a whole number"
    if isinstance(value, list | tuple | dict):
        return f"one label expected, got {shown(value)}"
    if not one_line(label_name(value)):
        return f"the label {value!r:.60} has a control character or a line break; clean the data"
    return ""


def class_settings(labels: Sequence[str], problem: str) -> dict[str, Any]:
    """What the config of a classifier must say: the names of its classes by id, and for transformers the kind
    of `problem`, which decides the loss."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem,
    }


def print_class(named: bool) -> str:
    """The line of a model card that prints the class of the first row."""
    best = "int(outputs.logits.argmax())"
    return f"print(model.config.id2label[{best}])" if named else f"print({best})"


def labels_of(names: Sequence[tuple[str, ...]], training: Iterable[int]) -> list[str]:
    """The labels that the rows `training` have, in the order of all labels. `names`: the labels of every row.
    Raises RowError if all rows together have fewer than two."""
    known = sorted_labels({name for row in names for name in row})
    if len(known) < 2:
        have = f"have the same label {known}" if known else "are without a label"
        raise RowError([], f"all {len(names)} rows {have}; need two or more")
    trained = {name for k in training for name in names[k]}
    return [name for name in known if name in trained]
