"""`fedhl eval`: intervals, predictions row by row, scores by class, texts; against the exported models."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from support import small_models, tiny
from support.small_federation import federate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fedhl.config import load_config
from fedhl.errors import UserError
from fedhl.federation.federation import initial_state
from fedhl.federation.predictions import Completion, completions, first_answer, predictions
from fedhl.federation.scores import evaluate_round
from fedhl.run.asked import Asked
from fedhl.run.closer_look import HeldOut, closer_look, spread, with_fields
from fedhl.run.delivery import evaluate_run, export_run, table
from fedhl.run.tables import PAGE, Said, of_classes, of_confusions, of_samples
from fedhl.task.examples import IGNORED, Encoded
from fedhl.task.intervals import wilson
from fedhl.task.rows import Row, Rows

EPS32 = torch.finfo(torch.float32).eps
Json = dict[str, Any]


def final(run: Path) -> Json:
    return json.loads((run / "summary.json").read_text("utf-8"))["final"]


def read(file: Path) -> list[Json]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def close(value: float) -> Any:
    """Logits of about 10 in float32, from sums in another order."""
    return pytest.approx(value, abs=100 * EPS32)


def printed(said: list[Said], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as out:
        for each in said:
            console.print(each, soft_wrap=isinstance(each, str), markup=False)
    return out.get()


# --- rows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_tiny(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Said], Path]:
    """What `--classes --predictions` says of the classifier."""
    file = tmp_path_factory.mktemp("tiny") / "rows.jsonl"
    asked = Asked(predictions=file, classes=True)
    return evaluate_run(runs / "tiny", "last", None, asked=asked), file


@torch.no_grad()
def test_predictions_are_those_of_the_merged_model(
    of_tiny: tuple[list[Said], Path], runs: Path, tmp_path: Path
):
    said, file = of_tiny
    lines, source = read(file), tiny.rows(400)
    export_run(runs / "tiny", tmp_path / "model", None, "last")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert [line["row"] for line in lines] == sorted({line["row"] for line in lines})
    for line in lines:
        own = source[line["row"]]
        assert {name: line[name] for name in own} == own
        logits = model(**tokenizer(own["text"], return_tensors="pt")).logits[0].double()
        p = {model.config.id2label[k]: float(x) for k, x in enumerate(logits.softmax(-1))}
        assert line["predicted"] == max(p, key=lambda label: p[label])
        assert line["probability"] == close(max(p.values()))
        assert line["loss"] == close(-math.log(p[own["label"]]))
        assert line["right"] == (line["predicted"] == own["label"])
    full = final(runs / "tiny")["full"]
    assert len(lines) == full["examples"] == 60
    assert sum(line["right"] for line in lines) / 60 == full["accuracy"]
    assert math.fsum(line["loss"] for line in lines) / 60 == pytest.approx(full["loss"])
    assert said[-1] == f"predictions of the full-rank update for 60 rows: {file}"
    assert file.stat().st_mode & 0o077 == 0


def test_a_table_has_what_the_lines_have(
    of_tiny: tuple[list[Said], Path], runs: Path, tmp_path: Path
):
    evaluate_run(runs / "tiny", "last", None, asked=Asked(predictions=tmp_path / "rows.csv"))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    lines = read(of_tiny[1])
    assert [list(row) for row in cells] == [list(line) for line in lines]
    for row, line in zip(cells, lines, strict=True):
        for name, value in line.items():
            assert (row[name] if isinstance(value, str) else json.loads(row[name])) == value


def test_predictions_of_a_rank(runs: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    evaluate_run(runs / "tiny", "last", None, asked=Asked(predictions=file, rank=1))
    lines, want = read(file), final(runs / "tiny")["ranks"]["1"]
    assert math.fsum(line["loss"] for line in lines) / 60 == pytest.approx(want["loss"], rel=1e-5)
    assert want["loss"] != pytest.approx(final(runs / "tiny")["full"]["loss"], rel=1e-4)


def test_a_row_says_where_it_is_and_what_it_has():
    row = Row({"text": "a", "loss": 3, "row": None, "day": Path("x"), "tags": [1, {"b": b"c"}]}, 7)
    line = with_fields(row, {"loss": 0.5, "right": True})
    assert line == {
        **{"row": 7, "text": "a", "row.loss": 3, "row.row": None, "day": "x"},
        **{"tags": [1, {"b": "b'c'"}], "loss": 0.5, "right": True},
    }
    assert next(iter(line)) == "row" and list(line)[-2:] == ["loss", "right"]


@small_models.both
@torch.no_grad()
def test_rows_are_predicted_one_by_one_in_their_order(kind: str):
    """Longest rows are read first, in batches of five: nothing of that is seen."""
    federation = federate(kind)
    model = federation.slots.model.eval()
    rows = small_models.rows(kind, 13)
    for row, made in zip(rows, predictions(federation, rows), strict=True):
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
        if kind == "bert":
            assert made.outputs is not None and made.outputs.tolist() == close_all(logits)
            assert made.terms["accuracy"].tolist() == [int(logits.argmax()) == row.labels]
            continue
        assert made.outputs is None and isinstance(row.labels, list)
        asked = [t for t in range(1, len(row.labels)) if row.labels[t] != IGNORED]
        want = [-float(logits[t - 1].log_softmax(-1)[row.labels[t]]) for t in asked]
        assert made.terms["loss"].tolist() == pytest.approx(want, abs=100 * EPS32)


def close_all(values: torch.Tensor) -> Any:
    return pytest.approx(values.tolist(), abs=100 * EPS32)


# --- texts --------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_and_samples_of_a_language_model(runs: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    asked = Asked(predictions=file, samples=5, new_tokens=4)
    said = evaluate_run(runs / "lm", "last", None, asked=asked)
    lines, full = read(file), final(runs / "lm")["full"]
    assert len(lines) == full["examples"] == 40
    tokens = sum(line["tokens"] for line in lines)
    assert math.fsum(line["loss"] * line["tokens"] for line in lines) / tokens == pytest.approx(
        full["loss"]
    )
    for line in lines:
        assert line["tokens"] == 3  # the label of two words, and the end
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    written = {k: line for k, line in enumerate(lines) if line["generated"] is not None}
    assert list(written) == [0, 8, 16, 24, 32]
    export_run(runs / "lm", tmp_path / "model", None, "last")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = printed(said)
    for line in written.values():
        ids = tokenizer(line["prompt"].strip())["input_ids"]
        new: list[int] = []
        while len(new) < 4 and tokenizer.eos_token_id not in new:
            logits = model(input_ids=torch.tensor([ids + new])).logits
            new.append(int(logits[0, -1].argmax()))
        assert line["generated"] == tokenizer.decode(new, skip_special_tokens=True)
        assert f"│ {line['row']} (counted from 0" in text and line["prompt"].strip() in text
        assert f"│ generated │ {line['generated']} " in text
    assert "greedy, at most 4 new tokens" in text


def test_samples_of_chats_from_other_rows(runs: Path, project: Path):
    said = evaluate_run(
        runs / "chat", "last", str(project / "rows.jsonl"), asked=Asked(samples=2, rank=2)
    )
    text, source = printed(said), tiny.rows(400)
    assert "samples, update truncated to rank 2" in text
    for k in (0, 200):
        assert f"│ prompt    │ <|user|> {source[k]['text']} <|assistant|> " in text
        assert f"│ wanted    │ the {source[k]['label']} " in text


def test_the_answer_is_what_the_loss_counts_first():
    no = IGNORED
    assert first_answer([no, no, 5, 6, no, no, 7]) == (2, 4)
    assert first_answer([no, 5, 6]) == (1, 3)
    # the first token is predicted from nothing: it is the prompt
    assert first_answer([4, 5, 6]) == (1, 3)
    assert first_answer([4, no, 6]) == (2, 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_generation_is_greedy_whatever_the_checkpoint_says_and_ends_in_time(
    kind: str, project: Path
):
    federation = federate(kind)
    model = federation.slots.model.eval()
    tokenizer = AutoTokenizer.from_pretrained(project / "llama")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    model.generation_config.do_sample, model.generation_config.temperature = True, 9.0
    model.generation_config.repetition_penalty = 5.0
    theirs = model.generation_config.to_dict()
    limit, rows = (
        small_models.LONGEST,
        [row for row in small_models.rows(kind, 9) if len(row[0]) > 4],
    )
    found = completions(federation, tokenizer, rows, 99)
    assert model.generation_config.to_dict() == theirs
    ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    for row, made in zip(rows, found, strict=True):
        assert isinstance(row.labels, list)
        start, _ = first_answer(row.labels)
        ids = row.input_ids[:start]
        while len(ids) < limit and not (len(ids) > start and ids[-1] in ends):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert made.generated == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert made.prompt == tokenizer.decode(ids[:start], skip_special_tokens=True)


def test_samples_are_spread_evenly():
    assert spread(40, 5) == [0, 8, 16, 24, 32]
    assert spread(7, 3) == [0, 2, 4]
    assert spread(3, 9) == [0, 1, 2] and spread(5, 0) == []


def test_long_texts_and_control_characters_do_not_reach_the_terminal():
    texts = [Completion("\n" + "a" * 500 + "\tend\n\n", "[bold]b", "c\x1b[31m" + "d" * 500)]
    said: list[Said] = [of_samples([Row({}, 3, 4)], texts, "full-rank update", 64)]
    assert max(map(len, printed(said, PAGE).splitlines())) == PAGE
    lines = [line.split("│") for line in printed(said, PAGE).splitlines() if line[0] == "│"]
    assert all(line[2].strip() for line in lines)  # nothing of empty lines at the ends
    out = printed(said, 1000)
    assert "\x1b" not in out and "\t" not in out and "[bold]b" in out
    assert "… aaa" in out and "a    end" in out and "d …" in out
    assert out.count("a") < 420 and out.count("d") < 420


# --- classes ------------------------------------------------------------------------------------


def test_scores_of_classes_are_those_of_the_predictions(of_tiny: tuple[list[Said], Path]):
    said, file = of_tiny
    lines, text = read(file), printed(said)
    f1s = []
    for label in ("animal", "plant"):
        taken = [line for line in lines if line["predicted"] == label]
        rows = [line for line in lines if line["label"] == label]
        right = sum(line["label"] == label for line in taken)
        precision, recall = right / len(taken), right / len(rows)
        f1s.append(2 * precision * recall / (precision + recall))
        want = [label, str(len(rows)), *(f"{x:.4f}" for x in (precision, recall, f1s[-1]))]
        assert want in [
            [part.strip() for part in row.split("│")[1:-1]] for row in text.splitlines()
        ]
    assert f"macro-F1 {sum(f1s) / 2:.4f}, the mean over the 2 classes" in text
    confident = math.fsum(line["probability"] for line in lines) / len(lines)
    accuracy = sum(line["right"] for line in lines) / len(lines)
    assert f"mean confidence {confident:.4f}, accuracy {accuracy:.4f}, expected" in text


def outcome(count: int, names: str, rows: int = 300) -> tuple[list[int], list[Json], list[str]]:
    """Rows whose every fourth is taken for the next class; the last class has no row."""
    labels = [f"{names}{k}" for k in range(count)]
    classes = [k % (count - 1) for k in range(rows)]
    best = [(c + (k % 4 == 0)) % (count - 1) for k, c in enumerate(classes)]
    lines = [
        {"predicted": labels[j], "probability": 0.9, "right": i == j}
        for i, j in zip(classes, best, strict=True)
    ]
    return classes, lines, labels


@pytest.mark.parametrize(
    ("count", "names", "shown"),
    [
        (3, "topic ", "┃ topic 0 ┃ topic 1 ┃ topic 2 ┃"),  # headed by names
        (20, "topic ", "taken for → 0 1 2 3"),  # by ids
        (20, "a name that is much too long for it ", "too large to be printed; --predictions"),
        (21, "", "too large to be printed"),
    ],
)
def test_a_matrix_is_printed_where_it_fits(count: int, names: str, shown: str):
    said = of_classes(*outcome(count, names), "full-rank update")
    text = printed(said, PAGE)
    assert shown in " ".join(text.split())
    assert all(len(line) <= PAGE for line in text.splitlines() if line[:1] in "┃│┏┡└0123456789")
    assert "– " in text and f"the mean over the {count - 1} classes" in text  # of the last class
    tables = [each for each in said if isinstance(each, Table)]
    assert str(tables[1].title) == "the most frequent confusions" and tables[1].row_count <= 10


def test_nothing_is_confused_and_labels_are_no_markup():
    import numpy as np

    assert of_confusions(np.diag([3, 4]), ["a", "b"]) == ["no row is taken for another class"]
    text = printed(of_confusions(np.array([[3, 1], [0, 4]]), ["[red]", "[/]"]))
    assert "[red]" in text and "[/]" in text and "25.0%" in text


# --- the table ----------------------------------------------------------------------------------


def rows_of(found: Table) -> dict[str, dict[str, str]]:
    names, *columns = [[str(cell) for cell in column.cells] for column in found.columns]
    heads = [str(column.header) for column in found.columns[1:]]
    return {
        name: dict(zip(heads, cells, strict=True))
        for name, *cells in zip(names, *columns, strict=True)
    }


def test_every_accuracy_has_an_interval(of_tiny: tuple[list[Said], Path], runs: Path):
    found, last = of_tiny[0][0], final(runs / "tiny")
    assert isinstance(found, Table)
    rows, worst = rows_of(found), last["clients"]["worst"]
    for name, metrics in {
        "full-rank update": last["full"],
        "truncated to rank 4": last["ranks"]["4"],
        f"worst client, {worst['client']}": worst,
    }.items():
        low, high = wilson(metrics["accuracy"], metrics["examples"])
        assert rows[name]["95%"] == f"{low:.3f}–{high:.3f}"
        assert rows[name]["examples"] == str(metrics["examples"])
    assert rows["clients on their own rows, mean"]["95%"] == ""
    assert "Wilson's interval" in str(found.caption) and "worst client" in str(found.caption)
    assert max(map(len, printed([found], PAGE).splitlines())) <= PAGE


def test_a_loss_has_no_interval(runs: Path):
    (found,) = evaluate_run(runs / "lm", "last", None)
    assert isinstance(found, Table) and found.caption is None
    assert [str(column.header) for column in found.columns] == ["model", "loss", "examples"]


def test_tasks_have_the_intervals_of_their_rows():
    federation = replace(federate("bert", held_out=20), tasks=[[0, 1], [2]])
    state = replace(initial_state(federation), round=4)
    evaluation = evaluate_round(federation, state, every_rank=False)
    rows = rows_of(table(evaluation, federation, state))
    for k, labels in enumerate(federation.tasks[: len(evaluation["tasks"]["accuracy"])]):
        n = sum(example.labels in labels for example in federation.held_out)
        row = rows[f"task {k + 1}, among the labels so far"]
        low, high = wilson(evaluation["tasks"]["accuracy"][k], n)
        assert (row["examples"], row["95%"]) == (str(n), f"{low:.3f}–{high:.3f}")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "asked", "said"),
    [
        ("lm", Asked(classes=True), "--classes: rows of a causal-lm task have no classes"),
        ("tiny", Asked(samples=3), "--samples: .* sequence-classification task writes no texts"),
        ("tiny", Asked(rank=2), "--rank 2 chooses the model of --predictions"),
        ("lm", Asked(classes=True, new_tokens=9), "--new-tokens 9 is the length of --samples"),
        ("chat", Asked(samples=3), "no held-out rows of its own .* with --data"),
        ("tiny", Asked(Path("rows.txt")), r"rows.txt: expected the name of a .jsonl or .csv file"),
        ("tiny", Asked(Path("rows.jsonl")), "rows.jsonl: the file is there already"),
        ("tiny", Asked(Path("none/rows.csv")), "none/rows.csv: there is no folder none"),
    ],
)
def test_what_a_run_cannot_answer(
    config: str, asked: Asked, said: str, project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=said):
        asked.check(load_config(f"{config}.yaml"), None)
    if config == "chat":
        asked.check(load_config(f"{config}.yaml"), "rows.jsonl")


def test_models_that_predict_nothing():
    examples = small_models.rows("bert", 4)
    rows: Rows = [Row({"text": "a"}, k) for k in range(4)]
    held_out = HeldOut(rows, Encoded(examples, [0, 1, 2, 3], 0))
    tokenizer: Any = None  # nothing is written

    def look(method: str, ruin: float) -> list[Said]:
        federation = federate("bert", dict.fromkeys(("a", "b"), 2), method=method)
        state = initial_state(federation)
        state = replace(state, head={name: x + ruin for name, x in state.head.items()})
        task = federation.config.task  # pyright: ignore[reportAttributeAccessIssue]
        names = ["x", "y", "z"]
        return closer_look(Asked(classes=True), task, federation, state, held_out, names, tokenizer)

    assert isinstance(look("fedhl", 0.0)[0], Table)
    with pytest.raises(UserError, match="has no global model to look at"):
        look("fedsa_lora", 0.0)
    with pytest.raises(UserError, match="are not finite: training had diverged"):
        look("fedhl", math.nan)


def test_a_prompt_that_was_dropped_leaves_the_numbers_of_the_others(runs: Path, tmp_path: Path):
    made = tiny.rows(6, seed=3)
    made[2]["prompt"] = "the " * 40  # no room for a completion
    source = tiny.write_rows(tmp_path / "other.jsonl", made)
    asked = Asked(predictions=tmp_path / "rows.jsonl")
    evaluate_run(runs / "lm", "last", str(source), asked=asked)
    lines = read(tmp_path / "rows.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 3, 4, 5]
    assert [line["prompt"] for line in lines] == [made[k]["prompt"] for k in (0, 1, 3, 4, 5)]
    assert "generated" not in lines[0]
