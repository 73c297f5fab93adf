"""The tables of docs/results.md, from the committed comparisons that experiments/tables.yaml names.

Means are over seeds, with 95% intervals by Student's t; differences are paired by seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedhl.report.statistics import mean_interval

MINUS = "\N{MINUS SIGN}"
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@dataclass(frozen=True)
class Row:
    """The runs of one variant by seed, and what the table says of them."""

    said: Mapping[str, str]
    metric: str
    rate: float
    runs: Mapping[int, Mapping[str, Any]]

    @property
    def factor(self) -> float:
        """Accuracies are in percent."""
        return 100.0 if self.metric == "accuracy" else 1.0

    def values(self, model: str, metric: str) -> list[float]:
        return [run["final"][model][metric] for _, run in sorted(self.runs.items())]

    def score(self, model: str = "full") -> list[float]:
        return [self.factor * value for value in self.values(model, self.metric)]


@cache
def read(file: str) -> dict[str, Any]:
    return json.loads((EXPERIMENTS / file).read_text(encoding="utf-8"))


def row_of(spec: Mapping[str, Any], file: str) -> Row:
    """The row that a part of tables.yaml names."""
    name, runs, rate, metric = spec["variant"], {}, 0.0, ""
    for each in spec.get("files", [spec.get("file", file)]):
        comparison = read(each)
        variant = next(v for v in comparison["variants"] if v["variant"] == name)
        rate = variant["learning_rate"] or comparison["config"]["training"]["learning_rate"]
        metric = comparison["metric"]
        runs |= {run["seed"]: run for run in variant["runs"]}
    said = {"method": f"`{name}`"} | {key: str(value) for key, value in spec.items()}
    return Row(said, metric, rate, runs)


# --- columns ------------------------------------------------------------------------------------


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.lstrip("+") if float(text) == 0 else text.replace("-", MINUS)


def score(row: Row, first: Row) -> str:
    mean, half = mean_interval(row.score())
    digits, unit = (1, "%") if row.metric == "accuracy" else (3, "")
    return f"{mean:.{digits}f} ± {half:.{digits}f}{unit}"


def seeds(row: Row, first: Row, model: str = "full") -> str:
    digits = 1 if row.metric == "accuracy" else 3
    return " / ".join(f"{value:.{digits}f}" for value in row.score(model))


def difference(row: Row, first: Row) -> str:
    """Bold where the interval is on one side of 0."""
    if row is first:
        return ""
    if row.runs.keys() != first.runs.keys():
        raise ValueError(f"{row.said['variant']}: other seeds than {first.said['variant']}")
    mean, half = mean_interval([a - b for a, b in zip(row.score(), first.score(), strict=True)])
    assert mean is not None and half is not None
    digits = 1 if row.metric == "accuracy" else 3
    text = f"{signed(mean, digits)} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def loss(row: Row, first: Row) -> str:
    mean, half = mean_interval(row.values("full", "loss"))
    return f"{mean:.3f} ± {half:.3f}"


def rate(row: Row, first: Row) -> str:
    return f"{row.rate:g}"


def moved(row: Row, first: Row) -> str:
    down, up = (
        fmean(run["bytes"][way] for run in row.runs.values()) / 2**20 for way in ("down", "up")
    )
    return " / ".join(f"{way:#.3g}".rstrip(".") for way in (down, up))


def heads(first: Row) -> dict[str, str]:
    """The heads of the columns."""
    order = " / ".join(map(str, sorted(first.runs)))
    name = first.said["method"]
    points = ", points" if first.metric == "accuracy" else ""
    return {
        "score": f"{first.metric}, full `W`",
        "seeds": f"seeds {order}",
        "difference": f"minus {name if 'payload' not in first.said else 'float32'}{points}",
        "rate": "rate",
        "smallest": "smallest rank",
        "bytes": "MiB down / up",
    }


COLUMNS: dict[str, Callable[[Row, Row], str]] = {
    "score": score,
    "seeds": seeds,
    "smallest": lambda row, first: seeds(row, first, "smallest"),
    "difference": difference,
    "loss": loss,
    "rate": rate,
    "bytes": moved,
}


def table(spec: Mapping[str, Any]) -> str:
    rows = [row_of(row, spec["file"]) for row in spec["rows"]]
    first = next(row for row in rows if row.said.get("first"))
    if spec.get("sorted"):
        best = -1 if first.metric == "accuracy" else 1
        rows.sort(key=lambda row: best * fmean(row.score()))
    columns: Sequence[str] = spec["columns"]
    head = [heads(first).get(column, column) for column in columns]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [COLUMNS[c](row, first) if c in COLUMNS else row.said[c] for c in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table by its name."""
    specs = yaml.safe_load((EXPERIMENTS / "tables.yaml").read_text(encoding="utf-8"))
    return {name: table(spec) for name, spec in specs.items()}
