"""Dolly as JSON lines: `prompt` (instruction and context), `completion`, `category`, shuffled.

    python experiments/dolly_rows.py FILE [OUT]

FILE is a JSON array of rows with `instruction`, `input` (or `context`), `output` (or `response`) and
`category`, as the data set is published in several places (CC-BY-SA-3.0; it is not part of this repository).
Writes OUT, which is `build/dolly.jsonl` unless given.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def main(file: Path, out: Path) -> None:
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        context = (row.get("input") or row.get("context") or "").strip()
        asked = "\n\n".join(part for part in (context, row["instruction"].strip()) if part)
        answer = row["output"] if "output" in row else row["response"]
        rows.append({"prompt": f"{asked}\n\n", "completion": answer, "category": row["category"]})
    random.Random(0).shuffle(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(rows)} rows")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build/dolly.jsonl"))
