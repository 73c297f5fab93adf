"""The numbers that a report computes from the files of a run: means, ranges, intervals and shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from fedhl.report.files import Client, Run, items, num

# --- of any values ------------------------------------------------------------------------------


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


class Range(NamedTuple):
    """Values of one round: their mean, the least and the largest."""

    round: float
    mean: float
    low: float
    high: float


def ranges(by_round: Mapping[float, Sequence[float]]) -> list[Range]:
    """Mean and range of the values of every round, in the order of the rounds."""
    return [Range(t, fmean(v), min(v), max(v)) for t, v in sorted(by_round.items())]


def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with `P(|T| < t) = level` for Student's T with `df` degrees of freedom.

    With `θ = atan(t/√df)`, the probability is a finite sum of powers of cos θ (Abramowitz and Stegun
    26.7.3 for odd df, 26.7.4 for even), which grows with θ: solved for it by bisection.
    """
    if df < 1 or not 0 < level < 1:
        raise ValueError(f"expected df >= 1 and a level in (0, 1), got {df} and {level}")

    def probability(angle: float) -> float:
        cos2, odd = math.cos(angle) ** 2, df % 2
        term, terms = math.cos(angle) if odd else 1.0, 0.0
        for k in range(odd, df - 1, 2):
            terms += term
            term *= cos2 * (k + 1) / (k + 2)
        series = math.sin(angle) * terms
        return 2 / math.pi * (angle + series) if odd else series

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


class Interval(NamedTuple):
    """A mean, and the half-width of its 95% interval."""

    mean: float | None
    half: float | None


def mean_interval(values: Sequence[float | None]) -> Interval:
    """The mean, and the half-width of its 95% interval by Student's t: `t s / √n`.

    There is no mean if a value is missing, since a failed seed must not be left out quietly; and no interval
    for a single value.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Interval(None, None)
    if len(known) == 1:
        return Interval(known[0], None)
    half = t_quantile(len(known) - 1) * stdev(known) / math.sqrt(len(known))
    return Interval(fmean(known), half)


# --- of a run -----------------------------------------------------------------------------------

PHASES = (
    "compute",
    "other training",
    "broadcast",
    "aggregate",
    "diagnostics",
    "evaluate",
    "checkpoint",
)
"""The phases of a round; "compute" and "other training" make up the file's "train"."""


def compute_share(run: Run) -> float | None:
    """Σ compute / Σ (total - evaluate) over the training rounds that have these times."""
    spent = whole = 0.0
    for line in run.rounds:
        compute, all_of_it = num(line, "seconds", "compute"), num(line, "seconds", "total")
        if line["round"] > 0 and compute is not None and all_of_it is not None:
            spent += compute
            whole += all_of_it - (num(line, "seconds", "evaluate") or 0.0)
    return spent / whole if whole > 0 else None


def phase_seconds(run: Run) -> dict[str, list[float]]:
    """Seconds per phase and round, without phases that never took time; "rest": seconds outside all
    phases."""
    parts: dict[str, list[float]] = {name: [] for name in (*PHASES, "rest")}
    for line in run.rounds:
        spent = {name: num(line, "seconds", name) or 0.0 for name in (*PHASES, "train", "total")}
        spent["other training"] = max(spent["train"] - spent["compute"], 0.0)
        spent["rest"] = max(spent["total"] - sum(spent[name] for name in PHASES), 0.0)
        for name, values in parts.items():
            values.append(spent[name])
    return {name: values for name, values in parts.items() if any(values)}


def cohort_examples(run: Run) -> dict[int, float]:
    """{round: examples of all its clients together}."""
    return {
        line["round"]: sum(num(entry, "examples") or 0.0 for entry in items(line, "clients"))
        for line in run.rounds
    }


def mean_weight(client: Client) -> float | None:
    """A client's mean weight over the rounds in which it took part."""
    return mean(num(entry, "weight") for entry in client.rounds.values())


def mean_data_share(client: Client, cohort: Mapping[int, float]) -> float | None:
    """A client's share of the examples of each round's cohort, over the rounds it took part in."""
    return mean(
        examples / cohort[t]
        for t, entry in client.rounds.items()
        if (examples := num(entry, "examples")) is not None and cohort.get(t)
    )


def mean_accuracy(row: Sequence[float]) -> float:
    """The mean accuracy over the tasks so far."""
    return sum(row) / len(row)


@dataclass(frozen=True)
class Traffic:
    """Bytes that the clients of one rank received and sent."""

    rank: int
    clients: int
    down: list[float]
    up: list[float]


def traffic_by_rank(run: Run, ranks: Iterable[int]) -> list[Traffic]:
    """The traffic of each rank; ranks for which no bytes were recorded are left out."""
    found = []
    for rank in ranks:
        those = [[e for r, _, e in c.by_rank() if r == rank] for c in run.clients]
        entries = [entry for of_client in those for entry in of_client]
        down = [v for e in entries if (v := num(e, "bytes_down")) is not None]
        up = [v for e in entries if (v := num(e, "bytes_up")) is not None]
        if down or up:
            found.append(Traffic(rank, sum(1 for of_client in those if of_client), down, up))
    return found
