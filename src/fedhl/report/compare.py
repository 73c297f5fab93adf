"""A comparison: the runs of its folder by variant and seed, their statistics, and a table of them.

A pure function of files: `comparison.json` says which run folders belong to which variant (`fedhl
compare` wrote that), everything else comes from the run folders and is written back beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from fedhl.errors import UserError
from fedhl.files import write_text
from fedhl.report.files import (
    Json,
    Run,
    dig,
    final_evaluation,
    items,
    num,
    read_run,
    total,
)
from fedhl.report.html import MINUS

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {
    "full": "full W",
    "truncated": "T_rmax(W)",
    "smallest": "smallest rank",
    "mean": "mean client",
    "worst": "worst client",
}
"""What a final model is judged by: with the full-rank W, as clients of the largest and of the smallest
rank deploy it, and by the clients on rows of their own."""

CURVES = {
    "full": ("full",),
    "truncated": ("truncated",),
    "mean": ("clients", "mean"),
    "worst": ("clients", "worst"),
}
"""Those that are measured in every round, with the keys of an evaluation that lead there."""

COSTS = {
    "MiB down": ("bytes", "down", 2**20),
    "MiB up": ("bytes", "up", 2**20),
    "Seconds training": ("seconds", "train", 1),
    "Seconds in all": ("seconds", "total", 1),
}
"""Totals of a run: group and key of its files, and the unit."""


# --- statistics ---------------------------------------------------------------------------------


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


def mean_interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean, and the half-width of its 95% interval by Student's t: `t s / √n`.

    No mean if a value is missing, for a seed that failed must not be left out quietly; no interval
    of a single value.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    if len(known) == 1:
        return known[0], None
    return fmean(known), t_quantile(len(known) - 1) * stdev(known) / math.sqrt(len(known))


# --- the folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One run folder of a comparison; `run` is None until its first round is on disk."""

    seed: int
    rate: float | None
    folder: str | None
    run: Run | None

    @property
    def status(self) -> str:
        if self.run is None:
            return "missing" if self.folder else "waits for its learning rate"
        return str(dig(self.run.summary, "status") or "running")

    @property
    def finished(self) -> Run | None:
        return self.run if self.status == "finished" else None

    @cached_property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Loss and accuracy at the end, by the kinds that were measured."""
        final = final_evaluation(self.run)[1] if self.run else {}
        ranks = dig(final, "ranks") or {}
        found = {name: dig(final, *keys) for name, keys in CURVES.items()}
        found["smallest"] = ranks[min(ranks, key=int)] if ranks else None
        return {
            kind: {name: num(found[kind], name) for name in ("loss", "accuracy") if name in value}
            for kind in KINDS
            if isinstance(value := found[kind], dict)
        }

    def score(self, kind: str, metric: str) -> float | None:
        return self.scores.get(kind, {}).get(metric)

    def total(self, group: str, key: str) -> float | None:
        """A total of the run so far, e.g. of bytes down."""
        return total(self.run, group, key) if self.run else None


@dataclass(frozen=True)
class Variant:
    """A method with its own settings: its runs by seed, and those that chose its learning rate."""

    text: str
    trials: list[Trial]
    grid: list[Trial]
    rate: float | None

    @property
    def finished(self) -> list[Run]:
        return [run for trial in self.trials if (run := trial.finished)]

    @property
    def weighting(self) -> Json | None:
        return next((dig(run.summary, "weighting") for run in self.finished), None)

    @property
    def ranks(self) -> list[int]:
        clients = [client for run in self.finished for client in items(run.summary, "clients")]
        return sorted({int(rank) for client in clients if (rank := num(client, "rank"))})

    def values(self, kind: str, metric: str) -> list[float | None]:
        """Of the finished runs, by seed; empty if none of them was judged that way."""
        done = [trial for trial in self.trials if trial.finished]
        judged = any(metric in trial.scores.get(kind, {}) for trial in done)
        return [trial.score(kind, metric) for trial in done] if judged else []

    def cost(self, group: str, key: str) -> float | None:
        """The mean over the finished runs of a total, e.g. of bytes down."""
        return mean_interval([total(run, group, key) for run in self.finished])[0]


@dataclass(frozen=True)
class Comparison:
    """What `comparison.json` names, read from the run folders."""

    plan: Json
    variants: list[Variant]

    @property
    def name(self) -> str:
        return str(self.plan["name"])

    @property
    def trials(self) -> list[Trial]:
        return [trial for variant in self.variants for trial in variant.trials]

    @property
    def finished(self) -> tuple[int, int]:
        """How many of its run folders are finished, and how many there are to be."""
        there = {t.folder for v in self.variants for t in (*v.grid, *v.trials) if t.finished}
        return len(there), int(self.plan["planned"])

    @property
    def metric(self) -> str:
        return next((run.metric for v in self.variants for run in v.finished), "loss")

    @property
    def kinds(self) -> list[str]:
        """Those to show: of the global model, and of the clients if some variant has nothing else."""
        done = [variant for variant in self.variants if variant.finished]
        of_server = [v for v in done if any(v.values(k, "loss") for k in ("full", "truncated"))]
        if done and not of_server:
            return ["mean", "worst"]
        return ["full", "truncated", *(["mean"] if len(of_server) < len(done) else [])]

    @property
    def common(self) -> str:
        """The kind to compare by: the first that any variant has."""
        measured = (k for k in self.kinds if any(v.values(k, self.metric) for v in self.variants))
        return next(measured, self.kinds[0])

    def validation(self, trial: Trial) -> dict[str, float | None]:
        """Loss and accuracy that a learning rate is chosen by: of the full W on the server's validation
        rows, or the mean over clients on rows that these hold back."""
        final = final_evaluation(trial.run)[1] if trial.run else {}
        found = dig(final, "validation") or dig(final, "clients", "mean") or {}
        return {name: num(found, name) for name in ("loss", "accuracy") if name in found}

    def differences(self, variant: Variant) -> list[float | None]:
        """Its metric minus the first variant's, seed by seed where both have finished."""
        first = {t.seed: t for t in self.variants[0].trials if t.finished}
        pairs = [
            (
                trial.score(self.common, self.metric),
                first[trial.seed].score(self.common, self.metric),
            )
            for trial in variant.trials
            if trial.finished and trial.seed in first
        ]
        return [None if a is None or b is None else a - b for a, b in pairs]


def read_comparison(folder: Path) -> Comparison:
    """Raises UserError if `comparison.json` is missing or a run folder is damaged."""
    path = folder / "comparison.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the folder of a comparison: {path.name} cannot be read ({error})"
        ) from None

    def trial(seed: int, rate: float | None, below: str | None) -> Trial:
        run = None
        if below is not None and (folder / below / "metrics.jsonl").is_file():
            run = read_run(folder / below)
        return Trial(seed, rate, below, run)

    variants = [
        Variant(
            text=entry["variant"],
            trials=[trial(r["seed"], entry["learning_rate"], r["folder"]) for r in entry["runs"]],
            grid=[trial(plan["seeds"][0], g["rate"], g["folder"]) for g in entry["grid"]],
            rate=entry["learning_rate"],
        )
        for entry in plan["variants"]
    ]
    return Comparison(plan, variants)


# --- as JSON and as a table ---------------------------------------------------------------------


def results(comparison: Comparison) -> Json:
    """The plan with what its runs have come to: statistics by variant, and facts by run."""
    variants = []
    for entry, variant in zip(comparison.plan["variants"], comparison.variants, strict=True):
        grid = zip(entry["grid"], variant.grid, strict=True)
        runs = zip(entry["runs"], variant.trials, strict=True)
        variants.append(
            {
                **entry,
                "weighting": variant.weighting,
                "ranks": variant.ranks,
                "finished": len(variant.finished),
                "scores": _statistics(variant),
                "difference": _interval(comparison.differences(variant)),
                "bytes": {way: variant.cost("bytes", way) for way in ("down", "up")},
                "seconds": {way: variant.cost("seconds", way) for way in ("train", "total")},
                "grid": [
                    {"rate": g["rate"], "folder": g["folder"], "status": t.status}
                    | {"validation": comparison.validation(t)}
                    for g, t in grid
                ],
                "runs": [{"seed": r["seed"], "folder": r["folder"], **_facts(t)} for r, t in runs],
            }
        )
    shown = {"metric": comparison.metric, "compared by": comparison.common, "variants": variants}
    return comparison.plan | shown


def write_comparison(folder: Path) -> Path:
    """Write the results into `comparison.json`, and `comparison.html`, whose path is returned.

    Raises UserError as `read_comparison`.
    """
    from fedhl.report.compare_page import page

    comparison = read_comparison(folder)
    written = {
        "comparison.json": json.dumps(results(comparison), indent=1, ensure_ascii=False) + "\n",
        "comparison.html": page(comparison),
    }
    for name, text in written.items():
        write_text(folder / name, text)
    return folder / "comparison.html"


def _interval(values: Sequence[float | None]) -> Json:
    mean, half = mean_interval(values)
    return {"mean": mean, "half": half, "values": list(values)}


def _statistics(variant: Variant) -> Json:
    found = {
        kind: {m: _interval(v) for m in ("accuracy", "loss") if (v := variant.values(kind, m))}
        for kind in KINDS
    }
    return {kind: statistics for kind, statistics in found.items() if statistics}


def _facts(trial: Trial) -> Json:
    run = trial.run
    summary = run.summary if run else None
    return {
        "status": trial.status,
        "rounds": run.rounds[-1]["round"] if run and run.rounds else None,
        "final": trial.scores,
        "bytes": {way: trial.total("bytes", way) for way in ("down", "up")},
        "seconds": {way: trial.total("seconds", way) for way in ("train", "total")},
        **{key: dig(summary, key) for key in ("method", "fedhl", "commit", "hashes", "versions")},
    }


def spread_text(metric: str, mean: float | None, half: float | None) -> str:
    """77.7 ± 0.8% or 0.459 ± 0.065; a dash for what was not measured."""
    if mean is None:
        return "–"
    factor, digits, unit = (100, 1, "%") if metric == "accuracy" else (1, 3, "")
    spread = "" if half is None else f" ± {factor * half:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}{unit}".replace("-", MINUS)


def amount(value: float) -> str:
    """One decimal below a hundred, none above."""
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:,.0f}"


def span(ranks: Sequence[int]) -> str:
    """4 to 64, or 8."""
    return " to ".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "–"


def comparison_tables(folder: Path) -> list[Table]:
    """What the final models of each variant are worth, and what they cost; a row per variant."""
    comparison = read_comparison(folder)
    metric, kinds = comparison.metric, comparison.kinds
    quality, costs = [], []
    for variant in comparison.variants:
        weighting = str(dig(variant.weighting, "name") or "–")
        done = f"{len(variant.finished)}/{len(variant.trials)}"
        values = [variant.values(kind, metric) for kind in kinds]
        spreads = [spread_text(metric, *mean_interval(each)) for each in values]
        if metric != "loss":
            spreads.append(spread_text("loss", *mean_interval(loss(variant, comparison))))
        quality.append([variant.text, weighting, done, *spreads])
        spent = [(variant.cost(group, key), unit) for group, key, unit in COSTS.values()]
        amounts = ["–" if value is None else amount(value / unit) for value, unit in spent]
        rate = "–" if variant.rate is None else f"{variant.rate:g}"
        costs.append([variant.text, span(variant.ranks), *amounts, rate])
    headers = ["variant", "weighting", "seeds", *(f"{metric},\n{KINDS[kind]}" for kind in kinds)]
    headers += [] if metric == "loss" else ["loss"]
    title = f"{comparison.name}: means over seeds, ± half of a 95% interval"
    return [
        _table(title, headers, quality),
        _table("means of a run", ["variant", "ranks", *COSTS, "learning rate"], costs),
    ]


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"\n{title}"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        text = header in ("variant", "weighting", "ranks")
        table.add_column(Text(header), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def loss(variant: Variant, comparison: Comparison) -> list[float | None]:
    """The losses of the first kind shown that this variant has."""
    found = (variant.values(kind, "loss") for kind in comparison.kinds)
    return next((values for values in found if values), [])
