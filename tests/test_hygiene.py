"""What `fedhl check` says of rows that are no mistake and yet worth a look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedhl.config import Config
from fedhl.data.hygiene import remarks
from fedhl.data.shards import read

LABELS = {"kind": "sequence-classification"}
ANSWERS = {"kind": "causal-lm"}
CHATS = {"kind": "causal-lm", "messages": "messages"}


def said(
    folder: Path, rows: list[Any], held: list[Any] | None = None, **settings: Any
) -> list[str]:
    """The remarks on these training rows and held-out rows."""
    for name, some in (("rows", rows), ("held", held or [])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    held_out = {"source": str(folder / "held.jsonl")} if held else None
    config = {
        "name": "test",
        "model": {"source": "none"},
        "task": LABELS,
        "data": {"source": str(folder / "rows.jsonl"), "held_out": held_out},
        "partition": {"kind": "iid", "clients": 2},
        "evaluation": {"client_fraction": 0.0},
    }
    made = Config.model_validate(config | settings)
    return [*remarks(made, read(made))]


def row(k: int, label: object = None, text: str | None = None) -> dict[str, Any]:
    text = f"text {k}" if text is None else text
    label = "ab"[k % 2] if label is None else label
    chat = [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": text}]
    fields = {"text": text, "label": label, "prompt": f"q{k}", "completion": text}
    return fields | {"messages": chat}


@pytest.mark.parametrize("task", [LABELS, ANSWERS, CHATS], ids=["labels", "answers", "chats"])
def test_clean_rows_get_no_remark(task: dict[str, Any], tmp_path: Path) -> None:
    assert said(tmp_path, [row(k) for k in range(20)], [row(30), row(31)], task=task) == []


def test_labels_of_one_row(tmp_path: Path) -> None:
    rows = [row(k) for k in range(20)]
    assert said(tmp_path, [*rows, row(20, "c")]) == [
        "warning: 1 label has one training row alone: 'c'"
    ]
    (many,) = said(tmp_path, [*rows, *(row(20 + k, f"c{k:02}") for k in range(15))])
    shown = ", ".join(f"'c{k:02}'" for k in range(10))
    assert many == f"warning: 15 labels have one training row alone: {shown} and 5 more"


def test_labels_that_look_alike(tmp_path: Path) -> None:
    rows = [
        row(k, ("Pos", "pos ", "neg", "ne g", "STRASSE", "straße", "x")[k % 7]) for k in range(28)
    ]
    assert said(tmp_path, rows) == [
        "warning: labels that differ by case or blanks only: 'Pos' (4) and 'pos ' (4), "
        "'STRASSE' (4) and 'straße' (4), 'ne g' (4) and 'neg' (4)"
    ]


@pytest.mark.parametrize("task", [LABELS, ANSWERS, CHATS], ids=["labels", "answers", "chats"])
def test_texts_of_blanks_are_named_by_their_line(task: dict[str, Any], tmp_path: Path) -> None:
    rows = [row(k, text=" \n\t" if k in (3, 7) else None) for k in range(20)]
    assert said(tmp_path, rows, task=task) == [
        "warning: 2 training rows have a text of nothing but blanks: line 4, line 8"
    ]


@pytest.mark.parametrize("task", [LABELS, ANSWERS, CHATS], ids=["labels", "answers", "chats"])
def test_held_out_rows_that_are_trained_on(task: dict[str, Any], tmp_path: Path) -> None:
    rows = [row(k) for k in range(20)]
    held = [row(40), row(4, "a"), row(41), row(11)]
    assert said(tmp_path, rows, held, task=task) == [
        "warning: 2 of 4 held-out rows have the text of a training row, so that the scores are too "
        "good: line 2, line 4"
    ]


def test_rows_that_are_drawn_are_compared_too(tmp_path: Path) -> None:
    """Every text twice: whoever holds rows out, some are trained on."""
    rows = [row(k // 2, "ab"[k % 4 // 2]) for k in range(80)]
    each: list[dict[str, Any]] = [
        {"evaluation": {"client_fraction": 0.25}},
        {"data": {"source": str(tmp_path / "rows.jsonl"), "held_out": {"count": 20}}},
        {"data": {"source": str(tmp_path / "rows.jsonl"), "held_out": None, "validation": 20}},
    ]
    for settings in each:
        (line,) = said(tmp_path, rows, **settings)
        assert " of 20 held-out rows have the text of a training row" in line
