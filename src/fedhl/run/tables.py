"""The tables of a closer look: scores by class, confusions, and texts beside those that were wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from fedhl.federation.predictions import Completion
from fedhl.task.confusion import BINS, by_class, calibration, confusion, confusions, macro_f1
from fedhl.task.rows import place

Said = Table | str
"""A table, or a sentence."""

MOST_PAIRS = 10
MOST_CLASSES, PAGE = 20, 80  # of a matrix that people can read; the columns of a terminal
CORNER = "taken for →"
MOST_CHARACTERS = 400  # of a text that is printed


def of_classes(
    classes: Sequence[Any], lines: Sequence[Mapping[str, Any]], labels: Sequence[str], model: str
) -> list[Said]:
    """Scores by class, the most frequent confusions, the confusion matrix if it is small enough, and
    calibration.

    `classes`: the id of each row's class; `lines`: `predicted`, `probability` and `right` of each row;
    `labels`: the names of the classes by id; `model`: the name of the model.
    """
    ids = {label: k for k, label in enumerate(labels)}
    C = confusion(classes, [ids[line["predicted"]] for line in lines], len(labels))
    scores = by_class(C)
    known = [k for k, each in enumerate(scores) if each.f1 is not None]
    table = titled(f"classes by F1, {model}", "class")
    for name in ("rows", "precision", "recall", "F1"):
        table.add_column(name, justify="right")
    for k in sorted(range(len(labels)), key=lambda k: (k not in known, scores[k].f1 or 0)):
        rows, *shares = scores[k]
        table.add_row(
            Text(labels[k]), str(rows), *("–" if x is None else f"{x:.4f}" for x in shares)
        )
    found = calibration([line["probability"] for line in lines], [line["right"] for line in lines])
    return [
        table,
        f"macro-F1 {macro_f1(scores):.4f}, the mean over the {len(known)} classes that occur",
        *of_confusions(C, labels),
        f"calibration: mean confidence {found.confidence:.4f}, accuracy {found.accuracy:.4f}, expected "
        f"calibration error {found.error:.4f} ({BINS} bins of equal width, Guo et al. 2017)",
    ]


def titled(title: str, first: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, overflow="fold")  # names that differ at their ends only must stay whole
    return table


def of_confusions(C: NDArray[Any], labels: Sequence[str]) -> list[Said]:
    """The most frequent pairs of classes, and all of them."""
    pairs = confusions(C)
    if not pairs:
        return ["no row is taken for another class"]
    rows = C.sum(axis=1)
    table = titled("the most frequent confusions", "class")
    table.add_column("taken for", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("of the class", justify="right")
    for i, j, count in pairs[:MOST_PAIRS]:
        table.add_row(Text(labels[i]), Text(labels[j]), str(count), f"{count / rows[i]:.1%}")
    return [table, matrix(C, labels)]


def matrix(C: NDArray[Any], labels: Sequence[str]) -> Said:
    """The confusion matrix, if it fits into a terminal: headed by names, or else by ids and without
    lines."""
    ids = [str(k) for k in range(len(labels))]
    numbered = [f"{k} {label}" for k, label in zip(ids, labels, strict=True)]
    for names, heads, lines in ((labels, labels, 3), (numbered, ids, 1)):
        columns = [(CORNER, *names), *((head, *map(str, C[:, j])) for j, head in enumerate(heads))]
        width = sum(max(map(cell_len, column)) + lines for column in columns) + 1
        if len(labels) <= MOST_CLASSES and width <= PAGE:
            table = titled("confusion matrix", CORNER)
            for head in heads:
                table.add_column(Text(head), justify="right")
            for name, counts in zip(names, C, strict=True):
                table.add_row(Text(name), *map(str, counts))
            if lines == 1:
                table.box, table.padding = None, (0, 1, 0, 0)
            return table
    return (
        f"the confusion matrix of {len(labels)} classes is too large to be printed; --predictions FILE "
        "writes the prediction of every row"
    )


def of_samples(
    rows: Sequence[dict[str, Any]], texts: Sequence[Completion], model: str, length: int
) -> Table:
    """The prompts, with what was wanted and what the model wrote."""
    table = titled(f"samples, {model}", "")
    table.caption, table.caption_justify = f"greedy, at most {length} new tokens", "left"
    table.add_column("", overflow="fold")
    table.show_header = False
    for k, (prompt, wanted, generated) in enumerate(texts):
        table.add_row(Text("row"), Text(place(list(rows), k).removeprefix("row ")))
        table.add_row(Text("prompt"), Text(end_of(readable(prompt))))
        table.add_row(Text("wanted"), Text(start_of(readable(wanted))))
        table.add_row(Text("generated"), Text(start_of(readable(generated))), end_section=True)
    return table


def readable(text: str) -> str:
    """A text without what would move the cursor of a terminal, and without empty lines at its ends."""
    text = text.replace("\t", "    ").strip("\n")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def start_of(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def end_of(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"… {text[-MOST_CHARACTERS:]}"
