"""First configs: what is guessed from rows, and that it is a config which says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import fedhl, rows

from fedhl.config import load_config
from fedhl.config.inputs import ColumnPartition, DirichletPartition, IIDPartition
from fedhl.demo import sentences
from fedhl.draft import draft, quoted
from fedhl.errors import UserError

TABLES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], type, str | None]] = {
    # rows, the fields of the task, the partition, the field of the client
    "texts and labels": (
        sentences(200),
        {"text": "text", "label": "label"},
        DirichletPartition,
        None,
    ),
    "with a site": (
        [{**row, "site": f"s{k % 3}"} for k, row in enumerate(sentences(200))],
        {"text": "text", "label": "label"},
        ColumnPartition,
        "site",
    ),
    "other names": (
        [{"Review": r["text"], "id": k, "Stars": k % 5} for k, r in enumerate(sentences(200))],
        {"text": "Review", "label": "Stars"},
        DirichletPartition,
        None,
    ),
    "a label of no known name": (
        [{"body": r["text"], "spam?": r["label"]} for r in sentences(200)],
        {"text": "body", "label": "spam?"},
        DirichletPartition,
        None,
    ),
    "prompts": (
        [{"Instruction": r["text"], "output": r["label"]} for r in sentences(50)],
        {"prompt": "Instruction", "completion": "output"},
        IIDPartition,
        None,
    ),
    "preferences": (
        [{"prompt": r["text"], "chosen": "yes", "rejected": "no"} for r in sentences(50)],
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        IIDPartition,
        None,
    ),
    "several labels": (
        [{"id": k, "text": r["text"], "topics": [r["label"]]} for k, r in enumerate(sentences(50))],
        {"text": "text", "label": "topics"},
        IIDPartition,
        None,
    ),
    "images in folders of clients": (
        [
            {"image": f"c{k % 3}/{r['label']}/{k}.png", "label": r["label"], "client": f"c{k % 3}"}
            for k, r in enumerate(sentences(200))
        ],
        {"image": "image", "label": "label"},
        ColumnPartition,
        "client",
    ),
    "chats": (rows(120), {"messages": "messages"}, ColumnPartition, "site"),
    "a label that is the user's name": (
        [
            {**r, "user": f"u{k}"} for k, r in enumerate(sentences(200))
        ],  # one row of each: no clients
        {"text": "text", "label": "label"},
        DirichletPartition,
        None,
    ),
}


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return path


@pytest.mark.parametrize("name", TABLES)
def test_what_rows_are_taken_for(name: str, tmp_path: Path) -> None:
    made, fields, partition, column = TABLES[name]
    data = write(tmp_path / "my rows.jsonl", made)
    text = draft(str(data), "some/model")
    (tmp_path / "c.yaml").write_text(text, "utf-8")
    config = load_config(tmp_path / "c.yaml")
    assert config.name == "my-rows" and config.data.source == str(data)
    assert config.model.source == "some/model"
    for setting, field in fields.items():
        assert getattr(config.task, setting) == field
    assert type(config.partition) is partition
    assert getattr(config.partition, "column", None) == column
    unused = [field for field in made[0] if field not in (*fields.values(), column)]
    assert all(f'"{field}"' in text for field in unused) and ("# not used: " in text) == bool(
        unused
    )


@pytest.mark.parametrize(
    "made",
    [
        [{"a": 1, "b": 2}] * 50,
        [{"text": f"text {k}", "id": k} for k in range(50)],  # no label
        [{"label": k % 2} for k in range(50)],  # no text
    ],
)
def test_rows_that_look_like_nothing_are_refused(
    made: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"look neither like messages, .* write the config by hand"):
        draft(str(write(tmp_path / "x.jsonl", made)))


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_name_is_one_yaml_text(text: str) -> None:
    assert yaml.safe_load(f"{{a: {quoted(text)}}}") == {"a": text}


def test_a_first_config_is_checked_and_trained(project: Path) -> None:
    csv = "review,mood\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in sentences(400))
    (project / "moods.csv").write_text(csv, "utf-8")
    done = fedhl(project, "init", "moods.csv", "--model", "bert")
    assert (done.code, done.err) == (0, ""), done
    assert done.out.endswith("written to moods.yaml; now: fedhl check moods.yaml\n")
    assert "THIS_FILE" not in (project / "moods.yaml").read_text("utf-8")
    again = fedhl(project, "init", "moods.csv", "--model", "bert")
    assert (again.code, again.err) == (
        2,
        "error: moods.yaml is there already; choose another file with --out\n",
    )
    small = ["--set", "lora.ranks=4"]  # the model is 32 wide
    checked = fedhl(project, "check", "moods.yaml", *small)
    assert checked.code == 0 and "10 of 10 clients a round" in checked.out, checked
    short = ["--set", "rounds=1", "--set", "training.epochs=0.1", "--quiet"]
    assert fedhl(project, "run", "moods.yaml", *small, *short).code == 0
