"""The table in docs/maths.md of the errors of a client that remembers, while W moves, and of their bounds."""

from __future__ import annotations

import json
from pathlib import Path

RESULT = Path(__file__).resolve().parent.parent / "experiments" / "theory" / "contraction.json"


def contraction_table() -> str:
    """One row for each size: the bounds of `E / Δ`, and the largest that was measured."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    largest = {(x["side"], x["rank"], x["steps"]): x["largest"] for x in result["moving"]}
    lines = [
        "| layer | r | worst case | flat step | `j^(-1/2)` step | orthogonal | random steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["bounds"]:
        size = row["side"], row["rank"]
        numbers = [
            row["bound"],
            largest[*size, "flat"],
            largest[*size, "j^-1/2"],
            row["uncorrelated"],
            largest[*size, "random"],
        ]
        cells = " | ".join(f"{x:g}" for x in numbers)
        lines.append(f"| {size[0]} x {size[0]} | {size[1]} | {cells} |")
    return "\n".join(lines)
