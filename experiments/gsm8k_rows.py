"""GSM8K as JSON lines: `prompt` (the question), `completion` (the working, and after #### the answer).

    python experiments/gsm8k_rows.py FOLDER [OUT]

FOLDER holds `train.jsonl` and `test.jsonl` of the published data set (MIT; it is not part of this
repository). The marks <<48/2=24>>, which are for a calculator, are left out. Writes OUT/train.jsonl and
OUT/test.jsonl, OUT being `build/gsm8k` unless given.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = []
        for row in map(json.loads, lines):
            working = re.sub(r"<<[^>]*>>", "", row["answer"])
            rows.append({"prompt": row["question"].strip(), "completion": working.strip()})
        random.Random(0).shuffle(rows)
        written = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(written), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build/gsm8k"))
