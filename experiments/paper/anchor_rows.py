"""Rows on which nobody trains, as JSON lines: HumanEval, and MMLU with the number of the right option.

    python experiments/paper/anchor_rows.py DATA [OUT]

DATA holds the published data sets in the folders `humaneval` (HumanEval.jsonl.gz, MIT) and `mmlu1444`
(mmlu_test_1444.jsonl, a JSON array of questions of MMLU in the form of FlowerTune's benchmark, which spells
"Qusetion"); they are not part of this repository. Writes OUT/humaneval.jsonl and OUT/mmlu.jsonl, OUT being
`build` unless given.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        write(out / "humaneval.jsonl", [json.loads(line) for line in lines])
    questions = json.loads((data / "mmlu1444/mmlu_test_1444.jsonl").read_text(encoding="utf-8"))
    rows = []
    for row in questions:
        letter = row["output"].removeprefix("The answer is:").strip()[0]
        question = row["input"].removeprefix("Qusetion:").strip().replace(" Options: ", "\n")
        rows.append({"question": question, "answer": "ABCD".index(letter), "subject": row["class"]})
    random.Random(0).shuffle(rows)  # so that the first rows are of every subject
    write(out / "mmlu.jsonl", rows)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build"))
