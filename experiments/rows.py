"""The rows of published data sets, where the configs of the experiments look for them.

    python experiments/rows.py NAME DATA [OUT]

NAME is one of the functions below, DATA the folder that holds the data sets, each in a folder of its own;
none of them is part of this repository. Writes to OUT, which is `build` unless given.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Rows = Iterable[dict[str, Any]]
LANGUAGES = {
    "javascript": r"java ?script|node\.?js|\breact\b|jquery",
    "java": r"\bjava\b",
    "python": r"\bpython\b|pandas|numpy",
    "c++": r"c\+\+",
    "sql": r"sql\b",
    "html": r"\bhtml\b|\bcss\b",
    "c#": r"c#",
    "php": r"\bphp\b",
    "shell": r"\bbash\b|\bshell\b|\blinux\b",
}
"""The first that an instruction names is its language; those that name none are `other`."""


def clinc150(data: Path) -> dict[str, Rows]:
    """`text`, `intent`, `domain` (CC-BY-3.0), from data_full.json and domains.json."""
    splits, domains = (parsed(data / f"clinc150/{name}.json") for name in ("data_full", "domains"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    return {
        f"clinc150/{name}.jsonl": (
            {"text": text, "intent": intent, "domain": domain_of[intent]}
            for text, intent in splits[name]
        )
        for name in ("train", "test")
    }


def banking77(data: Path) -> dict[str, bytes]:
    """`text`, `category` (CC-BY-4.0), as they are published: train.csv and test.csv."""
    files = [f"banking77/{name}.csv" for name in ("train", "test")]
    return {file: (data / file).read_bytes() for file in files}


def gsm8k(data: Path) -> dict[str, Rows]:
    """`prompt` (the question), `completion` (the working, and after #### the answer) (MIT), from train.jsonl
    and test.jsonl. The marks <<48/2=24>>, which are for a calculator, are left out."""

    def rows(name: str) -> Rows:
        for row in map(json.loads, text(data / f"gsm8k/{name}.jsonl").splitlines()):
            working = re.sub(r"<<[^>]*>>", "", row["answer"])
            yield {"prompt": row["question"].strip(), "completion": working.strip()}

    return {f"gsm8k/{name}.jsonl": rows(name) for name in ("train", "test")}


def dolly(data: Path) -> dict[str, Rows]:
    """`prompt` (context and instruction), `completion`, `category` (CC-BY-SA-3.0), from 3,000 rows of
    dolly_3k.json."""
    return {
        "dolly.jsonl": (
            {
                "prompt": asked(row["input"], row["instruction"]) + "\n\n",
                "completion": row["output"],
                "category": row["category"],
            }
            for row in parsed(data / "dolly3k/dolly_3k.json")
        )
    }


def codealpaca(data: Path) -> dict[str, Rows]:
    """`prompt` (input and instruction), `completion`, `language` (CC-BY-NC-4.0), from new_codealpaca.json and
    code_alpaca_2k.json, which have one instruction in common."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("new_codealpaca", "code_alpaca_2k"):
        for row in parsed(data / f"codealpaca/{name}.json"):
            prompt = asked(row["input"], row["instruction"])
            answer = row.get("response", row.get("output")).strip()
            if answer:
                row = {"prompt": prompt, "completion": answer, "language": language(prompt)}
                rows.setdefault(prompt, row)
    return {"codealpaca.jsonl": rows.values()}


def humaneval(data: Path) -> dict[str, Rows]:
    """The tasks of HumanEval (MIT), on which nobody trains, from HumanEval.jsonl.gz."""
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {"humaneval.jsonl": [json.loads(line) for line in lines]}


def mmlu(data: Path) -> dict[str, Rows]:
    """`question` with its options, `answer` (the number of the right one), `subject`, on which nobody trains,
    from mmlu_test_1444.jsonl: a JSON array of questions of MMLU (MIT) in the form of FlowerTune's benchmark,
    which spells "Qusetion"."""
    return {
        "mmlu.jsonl": (
            {
                "question": row["input"]
                .removeprefix("Qusetion:")
                .strip()
                .replace(" Options: ", "\n"),
                "answer": "ABCD".index(row["output"].removeprefix("The answer is:").strip()[0]),
                "subject": row["class"],
            }
            for row in parsed(data / "mmlu1444/mmlu_test_1444.jsonl")
        )
    }


SETS: dict[str, Callable[[Path], dict[str, Any]]] = {
    one.__name__: one for one in (clinc150, banking77, gsm8k, dolly, codealpaca, humaneval, mmlu)
}


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def parsed(file: Path) -> Any:
    return json.loads(text(file))


def asked(given: str, instruction: str) -> str:
    return "\n\n".join(part for part in (given.strip(), instruction.strip()) if part)


def language(prompt: str) -> str:
    named = (name for name, words in LANGUAGES.items() if re.search(words, prompt, re.IGNORECASE))
    return next(named, "other")


def json_lines(rows: Rows) -> bytes:
    """In an order drawn once, so that the first rows are of every kind."""
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shuffled).encode()


def main(name: str, data: Path, out: Path) -> None:
    for file, rows in SETS[name](data).items():
        place = out / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(rows if isinstance(rows, bytes) else json_lines(rows))
        print(place)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in SETS:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(SETS)}")
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3] if len(sys.argv) == 4 else "build"))
