"""A closer look at a finished run: its predictions row by row, its scores by class, the texts it writes."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from fedhl.errors import UserError
from fedhl.federation.federation import Federation
from fedhl.federation.predictions import Predicted, completions, predictions
from fedhl.federation.scores import changed, model_of_rank
from fedhl.files import finite, json_text, write_text
from fedhl.names import plural
from fedhl.run.asked import NEW_TOKENS, Asked, has_classes
from fedhl.run.tables import Said, of_classes, of_samples
from fedhl.server import ServerState
from fedhl.task import CausalTask, Kind
from fedhl.task.examples import Encoded
from fedhl.task.rows import Row, Rows
from fedhl.task.texts import TextKind

Line = dict[str, Any]


class HeldOut(NamedTuple):
    """Rows as their source has them, and as the model reads them."""

    rows: Rows
    encoded: Encoded


def closer_look(
    asked: Asked,
    task: Kind,
    federation: Federation,
    state: ServerState,
    held_out: HeldOut,
    labels: Sequence[str] | None,
    processor: Any,
) -> list[Said]:
    """What was asked for, of these rows, to be printed; writes the file of predictions, whole or not at all.

    `labels`: the names of the classes. Raises UserError without a global model, if its training has
    diverged, and if the file cannot be written.
    """
    model, change = model_of_rank(federation, state, asked.rank)
    examples = held_out.encoded.examples
    rows = [held_out.rows[k] for k in held_out.encoded.rows]
    chosen = spread(len(rows), asked.samples or 0)
    length = asked.new_tokens or NEW_TOKENS
    made, texts = [], []
    with changed(federation, state, change):
        if asked.predictions or asked.classes:
            made = predictions(federation, examples)
        if chosen:
            assert isinstance(task, TextKind)
            picked = [task.sequences(examples[k])[0] for k in chosen]
            texts = completions(federation, processor, picked, length)
    lines = [
        of_row(task, example, each, labels) for example, each in zip(examples, made, strict=False)
    ]
    if any(math.isnan(line["loss"]) for line in lines):
        raise UserError(
            f"the predictions of the {model} after round {state.round} are not finite: training had "
            "diverged; look at an earlier round, e.g. with --round best"
        )
    said: list[Said] = []
    if asked.classes:
        assert labels is not None
        said += of_classes([example.labels for example in examples], lines, labels, model)
    if texts:
        said.append(of_samples([rows[k] for k in chosen], texts, model, length))
    if asked.predictions:
        if asked.samples:
            generated = dict(zip(chosen, texts, strict=True))
            for k, line in enumerate(lines):
                line["generated"] = generated[k].generated if k in generated else None
        write_lines(
            asked.predictions,
            [with_fields(row, line) for row, line in zip(rows, lines, strict=True)],
        )
        said.append(
            f"predictions of the {model} for {plural(len(rows), 'row')}: {asked.predictions}"
        )
    return said


def spread(n: int, count: int) -> list[int]:
    """`count` of the places 0 to n - 1, evenly spread; all if there are fewer."""
    count = min(n, count)
    return [k * n // count for k in range(count)]


# --- rows ---------------------------------------------------------------------------------------


def of_row(task: Kind, example: Any, made: Predicted, labels: Sequence[str] | None) -> Line:
    """What is written of one prediction: of classes the predicted label, its probability, whether it is
    right, and the loss; of language models the mean loss over the completion tokens, their number, and the
    perplexity `exp(loss)`; of other kinds their metrics."""
    means = {name: float(values.mean()) for name, values in made.terms.items()}
    if has_classes(task):
        assert made.outputs is not None and labels is not None
        best = int(made.outputs.argmax())
        return {
            "predicted": labels[best],
            "probability": float(made.outputs.softmax(-1)[best]),
            "right": best == example.labels,
            "loss": means["loss"],
        }
    if isinstance(task, CausalTask):
        loss = made.terms["loss"]
        return {
            "loss": means["loss"],
            "tokens": len(loss),
            "perplexity": float(loss.mean().exp()),
        }
    return means


def with_fields(row: Mapping[str, Any], line: Line) -> Line:
    """The number of a row in its source, counted from 0, its own fields, and its prediction. A field of the
    row that has the name of a part of the prediction gets `row.` in front."""
    assert isinstance(row, Row)
    ours = {"row", *line}
    fields = {f"row.{name}" if name in ours else name: plain(value) for name, value in row.items()}
    return {"row": row.number, **fields, **line}


def plain(value: Any) -> Any:
    """A value that JSON can hold: what it cannot hold, such as a date, as text, of at most 200 characters."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return (
        [plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)[:200]
    )


def write_lines(file: Path, lines: Sequence[Line]) -> None:
    """Write a file whole or not at all: an object for each line of a .jsonl file; of a .csv file the columns
    are the names of all lines, and a list is JSON. Raises UserError if it cannot be written."""
    if file.suffix == ".jsonl":
        text = "".join(f"{json_text(line)}\n" for line in lines)
    else:
        names = list(dict.fromkeys(name for line in lines for name in line))
        into = StringIO()
        table = csv.DictWriter(into, names, lineterminator="\n")
        table.writeheader()
        table.writerows({name: cell(value) for name, value in line.items()} for line in lines)
        text = into.getvalue()
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"--predictions {file}: it cannot be written: {error.strerror}") from error


def cell(value: Any) -> str:
    """A value in a CSV file; nothing for what is not there or not finite."""
    value = finite(value)
    return "" if value is None else value if isinstance(value, str) else json_text(value)
