"""CodeAlpaca as JSON lines: `prompt` (instruction and input), `completion`, `language`, shuffled.

    python experiments/codealpaca_rows.py FOLDER [OUT]

FOLDER holds `new_codealpaca.json` and `code_alpaca_2k.json` of the published data set (CC-BY-NC-4.0; it is
not part of this repository). A row's language is the first of LANGUAGES that its instruction or input names;
rows that name none are `other`. Writes OUT, which is `build/codealpaca.jsonl` unless given.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

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


def language(asked: str) -> str:
    named = (name for name, words in LANGUAGES.items() if re.search(words, asked, re.IGNORECASE))
    return next(named, "other")


def main(folder: Path, out: Path) -> None:
    rows = {}
    for name in ("new_codealpaca.json", "code_alpaca_2k.json"):
        for row in json.loads((folder / name).read_text(encoding="utf-8")):
            given = (row["input"].strip(), row["instruction"].strip())
            asked = "\n\n".join(part for part in given if part)
            answer = (row["response"] if "response" in row else row["output"]).strip()
            if answer:
                row = {"prompt": asked, "completion": answer, "language": language(asked)}
                rows.setdefault(asked, row)  # one instruction is in both files
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in shuffled)
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(shuffled)} rows")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build/codealpaca.jsonl"))
