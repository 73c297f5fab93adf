"""The files of a run folder, parsed, and the values that a report takes from them.

A killed process may have left the files half written: a value that is missing or not finite is None, and is
never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedhl.errors import UserError
from fedhl.record import (
    FAILED,
    FINISHED,
    Json,
    Unit,
    better,
    more_is_better,
    read_metrics,
    read_summary,
    unit_of,
)


@dataclass
class Client:
    """One client: its facts in the summary, and its entry of every round in which it took part."""

    id: str
    rank: int | None = None
    examples: float | None = None
    labels: dict[str, float] = field(default_factory=dict)
    rounds: dict[int, Json] = field(default_factory=dict)

    def by_rank(self) -> Iterator[tuple[int, int, Json]]:
        """The client's rank, the round and the entry of every round in which it took part, if the rank is
        known."""
        for number, entry in self.rounds.items():
            rank = num(entry, "rank")
            if rank is not None:
                yield int(rank), number, entry


@dataclass(frozen=True)
class Run:
    """The files of a run folder, parsed."""

    name: str
    rounds: list[Json]
    summary: Json | None
    config: str | None
    clients: list[Client]
    metric: str
    greater: bool
    unit: Unit


# --- reading ------------------------------------------------------------------------------------


def read_run(run: Path) -> Run:
    """Read a run folder. Raises UserError for missing metrics, and for malformed files; an incomplete last
    line of the metrics is ignored."""
    if not (run / "metrics.jsonl").is_file():
        raise UserError(
            f"{run / 'metrics.jsonl'} not found: {run} is not the folder of a run that has started"
        )
    rounds = read_metrics(run)
    summary = read_summary(run) if (run / "summary.json").is_file() else None
    config = run / "config.yaml"
    name = dig(summary, "name") or run.resolve().name
    judged = next((e for line in rounds if dig(e := line.get("evaluation"), "metric")), None) or {
        "metric": dig(summary, "metric") or "loss"
    }
    return Run(
        name=str(name),
        rounds=rounds,
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        clients=clients_of(rounds, summary),
        metric=str(dig(summary, "metric") or judged["metric"]),
        greater=more_is_better(judged),
        unit=unit_of(judged),
    )


def clients_of(rounds: Sequence[Json], summary: Json | None) -> list[Client]:
    clients: dict[str, Client] = {}
    entries = [(None, entry) for entry in items(summary, "clients")]
    entries += [(line["round"], entry) for line in rounds for entry in items(line, "clients")]
    for number, entry in entries:
        client = clients.setdefault(str(entry.get("id")), Client(str(entry.get("id"))))
        rank, examples = num(entry, "rank"), num(entry, "examples")
        # the summary's, which comes first: a client may give up rank, and with tasks a round counts the rows
        # of its own task
        if client.rank is None and rank is not None:
            client.rank = int(rank)
        client.examples = examples if client.examples is None else client.examples
        if number is not None:
            client.rounds[number] = entry
        for label in dig(entry, "labels") or {}:
            client.labels[str(label)] = num(entry, "labels", label) or 0.0
    return sorted(clients.values(), key=lambda c: (c.rank or 0, natural(c.id)))


def dig(value: Any, *keys: str) -> Any:
    """Follow `keys` through nested objects; None as soon as one is missing or null."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def num(value: Any, *keys: str) -> float | None:
    """The finite number at `keys`, or None."""
    found = dig(value, *keys)
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return found if is_number and math.isfinite(found) else None


def items(value: Any, *keys: str) -> list[Json]:
    """The objects in the list at `keys`; empty when there is none."""
    found = dig(value, *keys)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def series(run: Run, *keys: str) -> list[tuple[float, float]]:
    """(round, value) for every round that has a finite number at `keys`."""
    return [(float(r["round"]), v) for r in run.rounds if (v := num(r, *keys)) is not None]


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts client-2 before client-10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return tuple((0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in parts)


def total(run: Run, group: str, key: str) -> float | None:
    """A total over the run: the summary's when it is finished, else the sum over the rounds so far."""
    if dig(run.summary, "status") in (FINISHED, FAILED):
        stated = num(run.summary, group, key)
        if stated is not None:
            return stated
    values = [value for _, value in series(run, group, key)]
    return sum(values) if values else None


def final_evaluation(run: Run) -> tuple[int | None, Json]:
    """The last evaluation of the run with its round; the summary's when no round has one."""
    for line in reversed(run.rounds):
        if isinstance(found := dig(line, "evaluation"), dict):
            return line["round"], found
    return None, dig(run.summary, "final") or {}


def truncated_name(run: Run) -> str:
    """T_64(W), with the rank of the last evaluation as a subscript."""
    rank = num(final_evaluation(run)[1], "truncated", "rank")
    digits = "" if rank is None else f"{rank:.0f}"
    return f"T{digits.translate(str.maketrans('0123456789', '₀₁₂₃₄₅₆₇₈₉'))}(W)"


def headline_kinds(run: Run) -> list[tuple[str, tuple[str, ...]]]:
    """The models by which a run is judged, as names and keys: W and its truncation, or, without a global
    score, the mean and the worst client."""
    final = final_evaluation(run)[1]
    if dig(final, "full") or not dig(final, "clients", "mean"):
        return [("full W", ("full",)), (truncated_name(run), ("truncated",))]
    return [("mean client", ("clients", "mean")), ("worst client", ("clients", "worst"))]


def headline(run: Run, *keys: str) -> tuple[float | None, float | None]:
    """The headline metric at evaluation.`keys`: its final value, and its change since round 0."""
    last, evaluation = final_evaluation(run)
    final = num(evaluation, *keys, run.metric)
    if last == 0:
        return final, None
    start = next(
        (num(r, "evaluation", *keys, run.metric) for r in run.rounds if r["round"] == 0), None
    )
    return final, None if final is None or start is None else final - start


def best(run: Run) -> tuple[float | None, float | None]:
    """Round and value of the best round: the summary's, else by the rule of `fedhl.record.better`."""
    found: Json | None = dig(run.summary, "best")
    if found is None:
        for line in run.rounds:
            if isinstance(evaluation := line.get("evaluation"), dict):
                found = better(found, evaluation, line["round"])
    return num(found, "round"), num(found, "value")
