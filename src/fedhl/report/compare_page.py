"""The values on the page of a comparison: one function for each section, from its runs to plain values.

The template of a section, in templates/comparison, has its words and its layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from urllib.parse import quote

from fedhl.report import plots
from fedhl.report.colours import CATEGORIES
from fedhl.report.files import dig, series
from fedhl.report.format import metric_text, settings, span
from fedhl.report.plots import Curve, Dots
from fedhl.report.render import View, figure, plot, render
from fedhl.report.statistics import Range, mean_interval, ranges
from fedhl.report.trials import COSTS, CURVES, KINDS, Comparison, Trial, Variant

UNEQUAL = (
    "data",
    "partition",
    "participation",
    "training.steps",
    "training.epochs",
    "evaluation.client",
)
"""Settings of a variant that change what it trains on, or how much."""
SHARED = {
    "commit": ("commit",),
    "model": ("hashes", "model"),
    "data": ("hashes", "data"),
    "PyTorch": ("versions", "torch"),
    "device": ("device",),
}
"""The facts that all runs should share, with the keys that lead to them in a summary."""
MOST_LINES = len(CATEGORIES)  # variants in one plot of curves; beyond, each has a plot of its own
SMALL = (240, 150)
FEW_SEEDS = 3
"""With fewer seeds an interval says little: of two, it is 12.7 standard errors to each side."""


def comparison_page(comparison: Comparison) -> str:
    """The whole page."""
    return render(
        "comparison.html",
        {
            "title": f"{comparison.name}: comparison",
            "refresh": None,
            "metric": comparison.metric,
            "greater": comparison.greater,
            "unit": comparison.unit,
            "score": partial(metric_text, comparison.unit),
            "kinds": KINDS,
            "common": comparison.common,
            "header": header(comparison),
            "overview": overview(comparison),
            "final": final(comparison),
            "curves": curves(comparison),
            "rates": rates(comparison),
            "runs": runs(comparison),
            "provenance": provenance(comparison),
        },
    )


def category(index: int) -> str:
    """The name of a variant's colour, by its place."""
    return f"q{index % len(CATEGORIES)}"


def ink(index: int) -> str:
    """The variant's colour in a plot, by its place."""
    return plots.color("q", index % len(CATEGORIES))


def label(index: int, variant: Variant) -> View:
    """A variant's colour, its number in every table and plot, and its name."""
    return {"ink": category(index), "number": index + 1, "text": variant.text}


def header(comparison: Comparison) -> View:
    done, planned = comparison.finished
    config, metric = comparison.plan["config"], comparison.metric
    finished = [run for variant in comparison.variants for run in variant.finished]
    weightings = {json.dumps(v.weighting) for v in comparison.variants if v.weighting}
    own = [
        (v.text, [part for part in v.text.split("@")[1:] if part.startswith(UNEQUAL)])
        for v in comparison.variants
    ]
    found = {
        what: sorted({str(dig(run.summary, *keys) or "unknown") for run in finished})
        for what, keys in SHARED.items()
    }
    return {
        "name": comparison.name,
        "done": done,
        "planned": planned,
        "variants": len(comparison.variants),
        "model": dig(config, "model", "source"),
        "data": dig(config, "data", "source"),
        "rounds": dig(config, "rounds"),
        "seeds": comparison.plan["seeds"],
        "not_finite": [
            (variant.text, KINDS[kind])
            for variant in comparison.variants
            for kind in comparison.kinds
            if None in variant.values(kind, metric)
        ],
        "chosen_on_clients": bool(comparison.plan["rates"])
        and any(v.finished and not v.values("full", "loss") for v in comparison.variants),
        "few": seeds if (seeds := fewest_seeds(comparison)) < FEW_SEEDS else 0,
        "weightings_differ": len(weightings) > 1,
        "baselines": [(v.text, v.baseline) for v in comparison.variants if v.baseline],
        "unequal": [(text, parts) for text, parts in own if parts],
        "not_shared": [(what, values) for what, values in found.items() if len(values) > 1],
    }


def fewest_seeds(comparison: Comparison) -> int:
    """The smallest number of finished seeds of a variant that has any; 0 if none has."""
    return min((len(v.finished) for v in comparison.variants if v.finished), default=0)


def overview(comparison: Comparison) -> View:
    """The scores of each variant's final models, and their costs."""
    metric = comparison.metric
    kinds = [
        kind
        for kind in (*comparison.kinds, "smallest")
        if any(variant.values(kind, metric) for variant in comparison.variants)
    ]
    rows = []
    for i, variant in enumerate(comparison.variants):
        differences = comparison.differences(variant) if i else []
        spent = [(variant.cost(group, key), unit) for group, key, unit in COSTS.values()]
        rows.append(
            {
                "variant": label(i, variant),
                "weighting": None
                if variant.weighting is None
                else {
                    "name": str(variant.weighting.get("name")),
                    "settings": settings(variant.weighting),
                },
                "finished": len(variant.finished),
                "scores": [mean_interval(variant.values(kind, metric)) for kind in kinds],
                "difference": mean_interval(differences),
                "loss": mean_interval(comparison.losses(variant)),
                "ranks": span(variant.ranks),
                "costs": [None if cost is None else cost / unit for cost, unit in spent],
                "rate": variant.rate,
            }
        )
    return {
        "first": comparison.variants[0].text,
        "shown": kinds,
        "costs": list(COSTS),
        "rows": rows,
        "untrained": {
            "scores": [mean_interval(comparison.untrained(kind, metric)) for kind in kinds],
            "loss": mean_interval(comparison.untrained(comparison.common, "loss")),
        },
    }


def final(comparison: Comparison) -> View | None:
    """Every seed's final model as a dot, its bytes, and its seconds; None before the first finished run."""
    metric, kind = comparison.metric, comparison.common
    percent, rows = comparison.unit != "number", []
    spent: dict[str, list[Curve]] = {"bytes": [], "seconds": []}
    for i, variant in enumerate(comparison.variants):
        mean, half = mean_interval(variant.values(kind, metric))
        values = [value for value in variant.values(kind, metric) if value is not None]
        if values:
            rows.append(Dots(f"{i + 1}  {variant.text}", values, ink(i), mean, half))
        for what, groups in spent.items():
            pairs = [(cost(t, what), t.score(kind, metric)) for t in variant.trials if t.finished]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            if points:
                groups.append(Curve(str(i + 1), points, ink(i)))
    if not rows:
        return None
    height = max(250, 50 + 36 * len(rows))
    draw = plots.strips(rows, percent=percent)
    seeds = plot("seeds", f"Final {metric} by seed", draw, height)
    axes = {"bytes": "MiB of a run", "seconds": "seconds of a run"}
    costs = {
        what: plot(
            what,
            f"{what.capitalize()} against final {metric}",
            plots.scatter(groups, axes[what], percent=percent),
            height,
        )
        for what, groups in spent.items()
        if groups
    }
    return {
        "seeds": seeds,
        "costs": costs,
        "lacking": [
            v.text for v in comparison.variants if v.finished and not v.values(kind, metric)
        ],
    }


def cost(trial: Trial, what: str) -> float | None:
    """All MiB of a run, down and up, or all its seconds."""
    if what == "seconds":
        return trial.total("seconds", "total")
    both = [trial.total("bytes", way) for way in ("down", "up")]
    return None if None in both else math.fsum(x for x in both if x is not None) / 2**20


def curves(comparison: Comparison) -> list[View]:
    """The headline metric per round, for every kind of model: the mean over seeds with their range."""
    metric, variants = comparison.metric, comparison.variants
    percent = comparison.unit != "number"
    shown = []
    for kind in comparison.kinds:
        if kind in ("worst", "personal"):  # another client from round to round; no model of a round
            continue
        found = [curve(i, variant, kind, metric) for i, variant in enumerate(variants)]
        drawn = [(i, one) for i, one in enumerate(found) if len(one.points) > 2]
        if not drawn:
            continue
        lines, multiples = None, []
        if len(variants) > MOST_LINES:
            multiples = small_plots(comparison, found, kind, percent)
        else:
            title = f"{metric.capitalize()} per round, {KINDS[kind]}"
            draw = plots.lines([one for _, one in drawn], percent=percent)
            lines = plot(f"curve-{kind}", title, draw, 300)
        labels = [label(i, variants[i]) for i, _ in drawn]
        shown.append({"kind": kind, "labels": labels, "lines": lines, "multiples": multiples})
    return shown


def curve(index: int, variant: Variant, kind: str, metric: str) -> Curve:
    """Mean and range over seeds, in the rounds in which every finished run has a value."""
    runs = [dict(series(run, "evaluation", *CURVES[kind], metric)) for run in variant.finished]
    rounds = set(runs[0]).intersection(*runs) if runs else set()
    found = ranges({t: [run[t] for run in runs] for t in rounds})
    points = [(each.round, each.mean) for each in found]
    return Curve(f"{index + 1}", points, ink(index), band=band(found) if len(runs) > 1 else [])


def band(found: Sequence[Range]) -> list[tuple[float, float, float]]:
    return [(each.round, each.low, each.high) for each in found]


def small_plots(
    comparison: Comparison, found: Sequence[Curve], kind: str, percent: bool
) -> list[View]:
    """For more lines than fit in one plot: a small plot for each, over the mean and the range of all."""
    by_round: dict[float, list[float]] = {}
    for t, value in (point for one in found for point in one.points):
        by_round.setdefault(t, []).append(value)
    over_all = ranges(by_round)
    means = [(each.round, each.mean) for each in over_all]
    everyone = Curve("", means, plots.MUTED, True, band(over_all))
    shown = []
    for i, one in enumerate(found):
        if len(one.points) < 2:
            continue
        variant = comparison.variants[i]
        draw = plots.lines([replace(one, label=""), everyone], percent=percent)
        drawn = figure(f"curve-{kind}-{i}", f"{i + 1} {variant.text}", draw, *SMALL)
        shown.append({"variant": label(i, variant), "figure": drawn})
    return shown


def rates(comparison: Comparison) -> View | None:
    """The scores by which the learning rates were chosen; None if they were not chosen."""
    grid: list[float] = comparison.plan["rates"]
    if not grid:
        return None
    rows = []
    for i, variant in enumerate(comparison.variants):
        cells = [
            {
                "score": comparison.validation(trial).get(comparison.metric),
                "chosen": trial.rate == variant.rate,
            }
            for trial in variant.grid
        ]
        edge = variant.rate in (min(grid), max(grid)) and len(grid) > 1
        row = {"variant": label(i, variant), "cells": cells, "rate": variant.rate, "at_edge": edge}
        rows.append(row)
    return {
        "chosen_on": comparison.plan["chosen_on"],
        "seed": comparison.plan["seeds"][0],
        "grid": grid,
        "rows": rows,
    }


def runs(comparison: Comparison) -> View:
    """One row per run, with a link to its own report."""
    rows = []
    for i, variant in enumerate(comparison.variants):
        for trial in variant.trials:
            run = trial.run
            summary = run.summary if run else None
            folder = trial.folder if trial.finished else None
            scores = [trial.score(kind, comparison.metric) for kind in comparison.kinds]
            rows.append(
                {
                    "variant": label(i, variant),
                    "seed": trial.seed,
                    "status": trial.status,
                    "report": f"{quote(folder)}/report.html" if folder else None,
                    "rounds": run.rounds[-1]["round"] if run and run.rounds else None,
                    "scores": scores if trial.finished else [None] * len(scores),
                    "seconds": trial.total("seconds", "total"),
                    "commit": str(dig(summary, "commit") or "–"),
                    "config": str(dig(summary, "hashes", "config") or "")[:12] or "–",
                }
            )
    return {"shown": comparison.kinds, "rows": rows}


def provenance(comparison: Comparison) -> View:
    run = next((run for variant in comparison.variants for run in variant.finished), None)
    summary = run and run.summary
    facts = {f"{key} version": value for key, value in (dig(summary, "versions") or {}).items()}
    hashes = (dig(summary, "hashes") or {}).items()
    facts |= {f"{key} hash": value for key, value in hashes if key != "config"}
    facts |= {key: dig(summary, key) for key in ("fedhl", "device", "precision")}
    return {
        "of_first": run is not None,
        "facts": list(facts.items()),
        "config": json.dumps(comparison.plan["config"], indent=1, ensure_ascii=False),
    }
