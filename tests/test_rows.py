"""The rows of experiments, made from files like those of the published data sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import rows


def made(tmp_path: Path, name: str, files: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What `rows.py NAME` writes from these files of data, each a text or something for JSON."""
    for file, content in files.items():
        place = tmp_path / "data" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        place.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    rows.main(name, tmp_path / "data", tmp_path / "build")
    return {
        str(file.relative_to(tmp_path / "build")): [
            json.loads(line) for line in file.read_text("utf-8").splitlines()
        ]
        for file in (tmp_path / "build").rglob("*.jsonl")
    }


def test_an_intent_has_its_domain(tmp_path: Path) -> None:
    found = made(
        tmp_path,
        "clinc150",
        {
            "clinc150/data_full.json": {
                "train": [["hi", "greeting"]],
                "test": [["bye", "parting"]],
            },
            "clinc150/domains.json": {"small talk": ["greeting", "parting"]},
        },
    )
    assert found == {
        "clinc150/train.jsonl": [{"text": "hi", "intent": "greeting", "domain": "small talk"}],
        "clinc150/test.jsonl": [{"text": "bye", "intent": "parting", "domain": "small talk"}],
    }


def test_the_marks_for_a_calculator_go(tmp_path: Path) -> None:
    line = (
        json.dumps({"question": "Half of 48? ", "answer": "48/2 = <<48/2=24>>24.\n#### 24"}) + "\n"
    )
    found = made(tmp_path, "gsm8k", {"gsm8k/train.jsonl": line, "gsm8k/test.jsonl": ""})
    row = {"prompt": "Half of 48?", "completion": "48/2 = 24.\n#### 24"}
    assert found == {"gsm8k/train.jsonl": [row], "gsm8k/test.jsonl": []}


def test_an_instruction_in_two_files_is_one_row_and_one_without_an_answer_none(
    tmp_path: Path,
) -> None:
    first = {"instruction": "Sort in Java", "input": "x", "response": "sort(x);"}
    second = {"instruction": "Sort in Java", "input": "x", "output": "another"}
    nothing = {"instruction": "Say nothing", "input": "", "output": " "}
    found = made(
        tmp_path,
        "codealpaca",
        {
            "codealpaca/new_codealpaca.json": [first],
            "codealpaca/code_alpaca_2k.json": [second, nothing],
        },
    )
    row = {"prompt": "x\n\nSort in Java", "completion": "sort(x);", "language": "java"}
    assert found == {"codealpaca.jsonl": [row]}


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("Write JavaScript that asks a Java server", "javascript"),
        ("A Java class", "java"),
        ("Print 1 in C++", "c++"),
        ("A MySQL query", "sql"),
        ("Explain pythons", "other"),
    ],
)
def test_the_language_of_an_instruction(prompt: str, language: str) -> None:
    assert rows.language(prompt) == language


def test_an_answer_of_mmlu_is_the_number_of_its_option(tmp_path: Path) -> None:
    question = {"input": "Qusetion: 1 + 1? Options: A. 1 B. 2", "output": "The answer is: B. 2"}
    found = made(
        tmp_path, "mmlu", {"mmlu1444/mmlu_test_1444.jsonl": [question | {"class": "sums"}]}
    )
    assert found["mmlu.jsonl"] == [
        {"question": "1 + 1?\nA. 1 B. 2", "answer": 1, "subject": "sums"}
    ]


def test_files_that_stay_as_they_are_stay_so_to_the_byte(tmp_path: Path) -> None:
    table = "text,category\r\nhi,greeting\r\n"
    made(tmp_path, "banking77", {"banking77/train.csv": table, "banking77/test.csv": table})
    assert (tmp_path / "build/banking77/train.csv").read_bytes() == table.encode()


def test_every_row_comes_once(tmp_path: Path) -> None:
    tasks = [{"task_id": f"HumanEval/{k}"} for k in range(20)]
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    found = made(tmp_path, "humaneval", {"humaneval/HumanEval.jsonl.gz": lines})["humaneval.jsonl"]
    assert found != tasks and sorted(found, key=tasks.index) == tasks
