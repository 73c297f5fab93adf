"""What a run folder says of itself: its rounds, its summary, and which round is best.

The files may be of a process that was killed, or is still writing. Only plain files are read here; the states
beside them are `fedhl.run.checkpoint`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedhl.errors import UserError

Json = dict[str, Any]


# --- names of rounds ----------------------------------------------------------------------------


def round_name(round: int) -> str:
    """`round-000012`: what belongs to one round, in an order that is that of the rounds."""
    return f"round-{round:06d}"


def rounds_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What belongs to one round each in `folder`, by round, the newest first; `suffix`: of files."""
    known = {
        int(path.name.removeprefix("round-").removesuffix(suffix)): path
        for path in folder.glob(f"round-[0-9]*{suffix}")
    }
    return dict(sorted(known.items(), reverse=True))


# --- what was written ---------------------------------------------------------------------------


def read_metrics(folder: Path) -> list[Json]:
    """The lines of metrics.jsonl, one a round; a last line that a kill has cut short is left out. None before
    the first round.

    Raises UserError for anything else that is malformed, naming the line.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1] == "":  # what follows the last newline
        lines.pop()
    rounds: list[Json] = []
    for number, text in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):  # the process was killed while writing it
                break
            raise UserError(
                f"{where}: not JSON ({error}); only the last line may be incomplete"
            ) from None
        if not isinstance(line, dict) or type(line.get("round")) is not int:
            raise UserError(
                f'{where}: expected an object with an integer "round", got {text[:60]!r}'
            )
        if rounds and line["round"] <= rounds[-1]["round"]:
            raise UserError(
                f"{where}: round {line['round']} after round {rounds[-1]['round']}; "
                "rounds must increase from line to line"
            )
        rounds.append(line)
    return rounds


def read_summary(folder: Path) -> Json:
    """The summary of a run. Raises UserError if it is missing or unreadable."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{folder} has no readable summary.json ({error}); was the run ever started?"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); fedhl resume {folder} writes it anew"
        ) from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


# --- which round is best ------------------------------------------------------------------------


def headline(evaluation: Mapping[str, Any]) -> float | None:
    """The number that a round is judged by: of the full model, else of what the top rank is sent, else
    the mean over the clients."""
    clients = evaluation.get("clients")
    metrics = evaluation.get("full") or evaluation.get("truncated") or (clients and clients["mean"])
    return metrics and metrics[evaluation["metric"]]


def better(best: Json | None, evaluation: Mapping[str, Any], round: int) -> Json | None:
    """The better of the best round so far and this one, as `{"round": ..., "value": ...}`; the earlier of
    equals."""
    value = headline(evaluation)
    if value is None:
        return best
    sign = 1 if evaluation["metric"] == "accuracy" else -1
    if best is None or sign * value > sign * best["value"]:
        return {"round": round, "value": value}
    return best
