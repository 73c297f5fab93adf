"""The checklist of a kind of task: what every row of the table must say, and do with rows."""

from __future__ import annotations

import io
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from support.characters import characters
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.pipelines import get_supported_tasks

from fedhl.errors import UserError
from fedhl.strict import help_of
from fedhl.task import KINDS, Kind, Task
from fedhl.task.rows import Rows
from fedhl.task.texts import TextKind

TOKENIZER = characters()
PICTURES = ViTImageProcessorPil(size={"height": 8, "width": 8})


def drawn(seed: int) -> bytes:
    """The file of an image of noise."""
    noise = np.random.default_rng(seed).integers(256, size=(12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    return file.getvalue()


ROWS: dict[str, Rows] = {
    "sequence-classification": [{"text": "warm", "label": "yes"}, {"text": "ice", "label": "no"}],
    "multi-label-classification": [
        {"text": "warm", "labels": ["yes", "hot"]},
        {"text": "ice", "labels": ["no"]},
    ],
    "regression": [{"text": "warm", "label": 0.5}, {"text": "ice", "label": -2}],
    "causal-lm": [{"prompt": "warm", "completion": "yes"}, {"prompt": "ice", "completion": "no"}],
    "preference": [
        {"prompt": "warm", "chosen": "yes", "rejected": "ice"},
        {"prompt": "ice", "chosen": "no", "rejected": "warm"},
    ],
    "image-classification": [{"image": drawn(0), "label": "a"}, {"image": drawn(1), "label": "b"}],
}
"""Two rows for each kind, whose fields have the names that they have by default."""
WRONG: dict[str, Any] = {"image": 7}
"""A value of the wrong type, where that is not a list."""

every_kind = pytest.mark.parametrize("name", KINDS)
every_text = pytest.mark.parametrize(
    "name", [name for name, kind in KINDS.items() if issubclass(kind, TextKind)]
)
every_field = pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, rows in ROWS.items() for field in rows[0]]
)


def build(name: str, **settings: Any) -> Any:
    return KINDS[name].model_validate({"kind": name, **settings})


def processor_of(task: Kind) -> Any:
    return TOKENIZER if isinstance(task, TextKind) else PICTURES


def labels_of(task: Kind, rows: Rows) -> list[str] | None:
    names = task.labels(rows, "rows.jsonl")
    return None if names is None else sorted({name for row in names for name in row})


def test_the_table_is_the_union_and_each_kind_has_one_name() -> None:
    assert list(KINDS.values()) == list(get_args(Task))
    assert set(KINDS) == set(ROWS)


@every_kind
def test_the_libraries_know_it(name: str) -> None:
    kind = KINDS[name]
    for loader in (kind.auto, kind.processor):
        assert hasattr(getattr(transformers, loader), "from_pretrained")
    assert kind.peft_type is None or kind.peft_type in peft.TaskType.__members__
    assert kind.pipeline in get_supported_tasks()


@every_kind
def test_it_is_judged_by_what_it_measures(name: str) -> None:
    kind = KINDS[name]
    assert kind.metrics[0] == "loss" and kind.metric in kind.metrics
    assert len(set(kind.metrics)) == len(kind.metrics) and "examples" not in kind.metrics
    assert kind.greater == (kind.metric not in ("loss", "mae"))


@every_kind
def test_its_settings(name: str) -> None:
    kind = KINDS[name]
    assert next(iter(kind.model_fields)) == "kind"
    assert ("max_length" in kind.model_fields) == issubclass(kind, TextKind)
    assert (kind.__doc__ or "").strip(), "the reference of settings begins with it"
    silent = kind.model_fields.keys() - help_of(kind).keys() - {"kind"}
    assert not silent, "every setting has its help"
    assert kind.class_setting is None or kind.class_setting in kind.model_fields


@every_kind
def test_its_rows_are_checked_and_encoded_and_its_predictions_scored(name: str) -> None:
    task, rows = build(name), ROWS[name]
    labels, processor = labels_of(task, rows), processor_of(task)
    task.check(rows, "rows.jsonl")
    encoded = task.encode(rows, "rows.jsonl", processor, labels)
    assert encoded.rows == [0, 1] and encoded.truncated == 0
    objective = task.objective(processor, len(TOKENIZER))
    assert (objective.metric, objective.greater) == (task.metric, task.greater)
    batch = objective.batch(encoded.examples)
    assert {len(values) for values in batch.values()} <= {2, 4}  # of a pair, two sequences
    assert [e for part in objective.parts(encoded.examples, 1) for e in part] != []
    shapes = {"causal-lm": (*batch.get("labels").shape, len(TOKENIZER)), "preference": (2,)}
    shape = shapes.get(name, (2, len(labels or ["a number"])))
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = objective.score(logits, batch)
    assert tuple(scores) == task.metrics
    assert {values.shape for values in scores.values()} == {(objective.terms(batch),)}
    assert bool((scores["loss"] > 0).all())
    for (
        metric,
        unit,
    ) in task.units.items():  # of each row it is true or false, or it is a number in between
        assert ((scores[metric] >= 0) & (scores[metric] <= 1)).all()
        assert (scores[metric].dtype == torch.bool) == (unit == "share of rows")
        assert unit == "share" or len(scores[metric]) == len(rows)
    assert "loss" not in task.units


@every_kind
def test_its_score_is_the_loss_of_the_model(name: str, tiny_models: dict[str, Any]) -> None:
    """What is reported of held-out rows is what training lowers."""
    task, rows = build(name), ROWS[name]
    labels, processor = labels_of(task, rows), processor_of(task)
    objective = task.objective(processor, len(TOKENIZER))
    batch = objective.batch(task.encode(rows, "rows.jsonl", processor, labels).examples)
    settings = task.model_settings(labels)
    auto = getattr(transformers, task.auto)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_models[task.auto]()
        for key, value in settings.items():
            setattr(config, key, value)
        model = auto.from_config(config).eval()
    with torch.no_grad():
        loss = objective.loss(model, batch)
        scores = objective.score(objective.outputs(model, batch), batch)
    torch.testing.assert_close(loss, scores["loss"].mean())


@pytest.fixture(scope="module")
def tiny_models() -> dict[str, Any]:
    """A config of a small model for each of the classes that load one."""
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = {**small, "intermediate_size": 16, "vocab_size": len(TOKENIZER), "pad_token_id": 0}
    llama = {**bert, "num_key_value_heads": 2}
    vit = {**small, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    return {
        "AutoModelForSequenceClassification": lambda: transformers.BertConfig(**bert),
        "AutoModelForCausalLM": lambda: transformers.LlamaConfig(**llama),
        "AutoModelForImageClassification": lambda: transformers.ViTConfig(**vit),
    }


@every_text
def test_long_rows_are_cut(name: str) -> None:
    rows = ROWS[name]
    labels = labels_of(build(name), rows)
    task = build(name)
    whole = task.encode(rows, "rows.jsonl", TOKENIZER, labels).examples
    room = max(task.length(example) for example in whole) - 1
    cut = build(name, max_length=room).encode(rows, "rows.jsonl", TOKENIZER, labels)
    assert cut.rows == [0, 1]
    for got, wanted in zip(cut.examples, whole, strict=True):
        parts = zip(task.sequences(got), task.sequences(wanted), strict=True)
        assert all(part.input_ids == of.input_ids[:room] for part, of in parts)
    assert cut.truncated == sum(task.length(example) > room for example in whole) > 0


@every_field
def test_a_field_that_is_missing_or_empty_is_named(name: str, field: str) -> None:
    first, second = ROWS[name]
    task, labels = build(name), labels_of(build(name), ROWS[name])
    absent = {key: value for key, value in second.items() if key != field}
    empty = [] if field == "labels" else [second | {field: None}]  # a row may be without labels
    for wrong in (absent, *empty):
        rows = [first, wrong]
        with pytest.raises(UserError, match=rf"rows.jsonl: .*field '{field}'"):
            task.check(rows, "rows.jsonl")
        with pytest.raises(UserError, match=rf"rows.jsonl: .*field '{field}'"):
            task.encode(rows, "rows.jsonl", processor_of(task), labels)


@every_field
def test_a_value_of_the_wrong_type_is_refused(name: str, field: str) -> None:
    first, second = ROWS[name]
    wrong = WRONG.get(field, {"an": "object"} if field == "labels" else ["a", "list"])
    with pytest.raises(UserError, match=r"rows.jsonl: .*row 1 "):
        build(name).check([first, second | {field: wrong}], "rows.jsonl")


@every_field
def test_a_setting_names_the_field(name: str, field: str) -> None:
    """A config says `label: stars` for a data set whose labels are called stars."""
    setting = "label" if field == "labels" else field
    assert setting in KINDS[name].model_fields
    rows = [{("other" if key == field else key): row[key] for key in row} for row in ROWS[name]]
    task = build(name, **{setting: "other"})
    task.check(rows, "rows.jsonl")
    with pytest.raises(UserError, match=f"no field '{field}'"):
        build(name).check(rows, "rows.jsonl")
    if KINDS[name].class_setting == field:
        assert task.class_field == "other"
        assert task.classes(rows, "rows.jsonl") == [row["other"] for row in rows]


# --- several labels, numbers, pairs -------------------------------------------------------------


def test_labels_of_a_table_are_parted_and_named_once() -> None:
    task = build("multi-label-classification")
    cells = ["a, b,a", None, "", "b"]
    rows: Rows = [{"text": "x", "labels": cell} for cell in cells]
    assert task.labels(rows, "f.csv") == [("a", "b"), (), (), ("b",)]
    encoded = task.encode(rows, "f.csv", TOKENIZER, ["b", "a"])
    assert [e.labels for e in encoded.examples] == [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (1.0, 0.0)]
    with pytest.raises(UserError, match=r"row 0 .*the label 'a' was not in training"):
        task.encode(rows, "f.csv", TOKENIZER, ["b", "c"])
    by_bar = build("multi-label-classification", separator="|")
    assert by_bar.labels([{"text": "x", "labels": "a, b|c"}], "f.csv") == [("a, b", "c")]


def test_f1_of_each_row_is_that_of_its_sets() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 4, generator=draw)
    labels = (torch.rand(40, 4, generator=draw) > 0.7).float()
    logits[0], labels[0] = -1.0, 0.0  # nothing found, nothing right
    got = KINDS["multi-label-classification"].score(logits, labels)["f1"]
    for value, row, wanted in zip(got.tolist(), logits.tolist(), labels.tolist(), strict=True):
        found = {k for k, x in enumerate(row) if x > 0}
        right = {k for k, y in enumerate(wanted) if y}
        precision = len(found & right) / len(found) if found else 0.0
        recall = len(found & right) / len(right) if right else 0.0
        harmonic = 2 * precision * recall / (precision + recall) if precision * recall else 0.0
        assert value == pytest.approx(1.0 if not found and not right else harmonic)


@pytest.mark.parametrize("value", ["1.5", 1, -0.25, "-1e3"])
def test_numbers_are_read(value: Any) -> None:
    assert build("regression").targets([{"text": "x", "label": value}], "f", None) == [float(value)]


@pytest.mark.parametrize("value", ["warm", "", True, float("nan"), "inf", [1.0], 10**400])
def test_what_is_no_number_is_refused(value: Any) -> None:
    rows = [{"text": "x", "label": 0.5}, {"text": "x", "label": value}]
    with pytest.raises(UserError, match=r"f: row 1 .*expected a number"):
        build("regression").check(rows, "f")


def test_a_pair_is_read_as_the_tokenizer_joins_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = characters()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A:0 $B:1", special_tokens=[]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows: Rows = [{"a": "warm", "b": "ice", "label": "x"}, {"a": "no", "b": "yes!", "label": "y"}]
    task = build("sequence-classification", text="a", second="b", max_length=6)
    assert task.texts(rows[0]) == ("warm", "ice")
    encoded = task.encode(rows, "f", tokenizer, ["x", "y"])
    whole = [tokenizer(row["a"], row["b"]) for row in rows]
    cut = tokenizer("warm", "ice", truncation=True, max_length=6)
    first, second = encoded.examples
    assert encoded.truncated == 1 and len(first.input_ids) == 6
    assert (first.input_ids, first.token_types) == (cut["input_ids"], cut["token_type_ids"])
    assert (second.input_ids, second.token_types) == (
        whole[1]["input_ids"],
        whole[1]["token_type_ids"],
    )
    assert set(second.token_types or ()) == {0, 1}
    batch = task.objective(tokenizer, 1).batch(encoded.examples)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    with pytest.raises(UserError, match="no field 'b'"):
        task.check([{"a": "warm", "label": "x"}], "f")
