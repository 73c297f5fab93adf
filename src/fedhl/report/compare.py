"""A comparison as JSON, as one self-contained page, and as tables for the terminal.

`comparison.json` names the runs and their folders; the results of the runs are written back into it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedhl.files import write_text
from fedhl.report.compare_page import comparison_page
from fedhl.report.files import Json, dig
from fedhl.report.format import amount, span, spread_text
from fedhl.report.statistics import mean_interval
from fedhl.report.trials import COSTS, CURVES, KINDS, Comparison, Trial, Variant, read_comparison

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Trial", "comparison_tables", "read_comparison", "write_comparison"]


def results(comparison: Comparison) -> Json:
    """The plan with the results of its runs: statistics by variant, and facts by run."""
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
                "scores": score_statistics(variant, comparison.metric),
                "difference": interval_facts(comparison.differences(variant)),
                "bytes": {way: variant.cost("bytes", way) for way in ("down", "up")},
                "seconds": {way: variant.cost("seconds", way) for way in ("train", "total")},
                "grid": [
                    {"rate": g["rate"], "folder": g["folder"], "status": t.status}
                    | {"validation": comparison.validation(t)}
                    for g, t in grid
                ],
                "runs": [
                    {"seed": r["seed"], "folder": r["folder"], **trial_facts(t)} for r, t in runs
                ],
            }
        )
    shown = {
        "metric": comparison.metric,
        "compared by": comparison.common,
        "untrained": {
            kind: interval_facts(values)
            for kind in CURVES
            if (values := comparison.untrained(kind, comparison.metric))
        },
        "variants": variants,
    }
    return comparison.plan | shown


def write_comparison(folder: Path) -> Path:
    """Write the results into `comparison.json`, and `comparison.html`, whose path is returned.

    Raises UserError as `read_comparison`.
    """
    comparison = read_comparison(folder)
    written = {
        "comparison.json": json.dumps(results(comparison), indent=1, ensure_ascii=False) + "\n",
        "comparison.html": comparison_page(comparison),
    }
    for name, text in written.items():
        write_text(folder / name, text)
    return folder / "comparison.html"


def interval_facts(values: Sequence[float | None]) -> Json:
    mean, half = mean_interval(values)
    return {"mean": mean, "half": half, "values": list(values)}


def score_statistics(variant: Variant, metric: str) -> Json:
    names = dict.fromkeys((metric, "loss"))
    found = {
        kind: {name: interval_facts(v) for name in names if (v := variant.values(kind, name))}
        for kind in KINDS
    }
    return {kind: statistics for kind, statistics in found.items() if statistics}


def trial_facts(trial: Trial) -> Json:
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


def comparison_tables(folder: Path) -> list[Table]:
    """The scores of each variant's final models, and their costs; a row per variant."""
    comparison = read_comparison(folder)
    metric, kinds = comparison.metric, comparison.kinds
    quality, costs = [], []
    for variant in comparison.variants:
        weighting = str(dig(variant.weighting, "name") or "–")
        done = f"{len(variant.finished)}/{len(variant.trials)}"
        values = [variant.values(kind, metric) for kind in kinds]
        spreads = [spread_text(comparison.unit, *mean_interval(each)) for each in values]
        if metric != "loss":
            spreads.append(spread_text("number", *mean_interval(comparison.losses(variant))))
        quality.append([variant.text, weighting, done, *spreads])
        spent = [(variant.cost(group, key), unit) for group, key, unit in COSTS.values()]
        amounts = ["–" if value is None else amount(value / unit) for value, unit in spent]
        rate = "–" if variant.rate is None else f"{variant.rate:g}"
        costs.append([variant.text, span(variant.ranks), *amounts, rate])
    start = [
        spread_text(comparison.unit, *mean_interval(comparison.untrained(k, metric))) for k in kinds
    ]
    if metric != "loss":
        loss = comparison.untrained(comparison.common, "loss")
        start.append(spread_text("number", *mean_interval(loss)))
    quality.append(["untrained", "–", "–", *start])
    headers = ["variant", "weighting", "seeds", *(f"{metric},\n{KINDS[kind]}" for kind in kinds)]
    headers += [] if metric == "loss" else ["loss"]
    title = f"{comparison.name}: means over seeds, ± half of a 95% interval"
    return [
        plain_table(title, headers, quality),
        plain_table("means of a run", ["variant", "ranks", *COSTS, "learning rate"], costs),
    ]


def plain_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"\n{title}"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        text = header in ("variant", "weighting", "ranks")
        table.add_column(Text(header), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
