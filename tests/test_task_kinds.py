"""The checklist of a kind of task: what every row of the table must say, and do with rows."""

from __future__ import annotations

from typing import Any, get_args

import peft
import pytest
import torch
import transformers
from support.characters import characters
from transformers.pipelines import get_supported_tasks

from fedhl.errors import UserError
from fedhl.strict import help_of
from fedhl.task import KINDS, Task
from fedhl.task.examples import collate
from fedhl.task.rows import Rows

TOKENIZER = characters()

ROWS: dict[str, Rows] = {
    "sequence-classification": [{"text": "warm", "label": "yes"}, {"text": "ice", "label": "no"}],
    "causal-lm": [{"prompt": "warm", "completion": "yes"}, {"prompt": "ice", "completion": "no"}],
}
"""Two rows for each kind, whose fields have the names that they have by default."""

every_kind = pytest.mark.parametrize("name", KINDS)
every_field = pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, rows in ROWS.items() for field in rows[0]]
)


def build(name: str, **settings: Any) -> Task:
    return KINDS[name](kind=name, **settings)  # pyright: ignore[reportArgumentType]


def labels_of(task: Task, rows: Rows) -> list[str] | None:
    classes = task.classes(rows, "rows.jsonl")
    return None if classes is None else sorted(set(classes))


def test_the_table_is_the_union_and_each_kind_has_one_name() -> None:
    assert list(KINDS.values()) == list(get_args(Task))
    assert set(KINDS) == set(ROWS)


@every_kind
def test_the_libraries_know_it(name: str) -> None:
    kind = KINDS[name]
    assert hasattr(getattr(transformers, kind.auto), "from_pretrained")
    assert kind.peft_type in peft.TaskType.__members__
    assert kind.pipeline in get_supported_tasks()


@every_kind
def test_it_is_judged_by_what_it_measures(name: str) -> None:
    kind = KINDS[name]
    assert kind.metrics[0] == "loss" and kind.metric in kind.metrics
    assert len(set(kind.metrics)) == len(kind.metrics) and "examples" not in kind.metrics


@every_kind
def test_its_settings(name: str) -> None:
    kind = KINDS[name]
    assert {"kind", "max_length"} <= kind.model_fields.keys()
    assert (kind.__doc__ or "").strip(), "the reference of settings begins with it"
    silent = kind.model_fields.keys() - help_of(kind).keys() - {"kind"}
    assert not silent, "every setting has its help"
    assert kind.class_setting is None or kind.class_setting in kind.model_fields


@every_kind
def test_its_rows_are_checked_and_encoded_and_its_predictions_scored(name: str) -> None:
    task, rows = build(name), ROWS[name]
    labels = labels_of(task, rows)
    task.check(rows, "rows.jsonl")
    encoded = task.encode(rows, "rows.jsonl", TOKENIZER, labels)
    assert encoded.rows == [0, 1] and encoded.truncated == 0
    assert all(len(example.input_ids) <= task.max_length for example in encoded.examples)
    batch = collate(encoded.examples, pad_id=0)
    assert len(batch["input_ids"]) == len(batch["labels"]) == 2
    per_token = isinstance(encoded.examples[0].labels, list)
    outputs = len(TOKENIZER) if per_token else len(labels or ["a number"])
    shape = (*batch["input_ids"].shape, outputs) if per_token else (2, outputs)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = task.score(logits, batch["labels"])
    assert tuple(scores) == task.metrics
    assert {values.shape for values in scores.values()} == {scores["loss"].shape}
    assert scores["loss"].ndim == 1 and len(scores["loss"]) and bool((scores["loss"] > 0).all())


@every_kind
def test_long_rows_are_cut(name: str) -> None:
    rows = ROWS[name]
    labels = labels_of(build(name), rows)
    whole = build(name).encode(rows, "rows.jsonl", TOKENIZER, labels).examples
    room = max(len(example.input_ids) for example in whole) - 1
    cut = build(name, max_length=room).encode(rows, "rows.jsonl", TOKENIZER, labels)
    assert cut.rows == [0, 1]
    assert [e.input_ids for e in cut.examples] == [e.input_ids[:room] for e in whole]
    assert cut.truncated == sum(len(example.input_ids) > room for example in whole) > 0


@every_field
def test_a_field_that_is_missing_or_empty_is_named(name: str, field: str) -> None:
    first, second = ROWS[name]
    absent = {key: value for key, value in second.items() if key != field}
    for wrong in (absent, second | {field: None}):
        rows = [first, wrong]
        task, labels = build(name), labels_of(build(name), ROWS[name])
        with pytest.raises(UserError, match=rf"rows.jsonl: .*field '{field}'"):
            task.check(rows, "rows.jsonl")
        with pytest.raises(UserError, match=rf"rows.jsonl: .*field '{field}'"):
            task.encode(rows, "rows.jsonl", TOKENIZER, labels)


@every_field
def test_a_value_of_the_wrong_type_is_refused(name: str, field: str) -> None:
    first, second = ROWS[name]
    with pytest.raises(UserError, match=r"rows.jsonl: .*row 1 "):
        build(name).check([first, second | {field: ["a", "list"]}], "rows.jsonl")


@every_field
def test_a_setting_names_the_field(name: str, field: str) -> None:
    """A config says `label: stars` for a data set whose labels are called stars."""
    assert field in KINDS[name].model_fields
    rows = [{("other" if key == field else key): row[key] for key in row} for row in ROWS[name]]
    task = build(name, **{field: "other"})
    task.check(rows, "rows.jsonl")
    with pytest.raises(UserError, match=f"no field '{field}'"):
        build(name).check(rows, "rows.jsonl")
    if KINDS[name].class_setting == field:
        assert task.class_field == "other"
        assert task.classes(rows, "rows.jsonl") == [row["other"] for row in rows]
