"""The values on the page of a run: one function for each section, from a parsed run to plain values.

The template of a section, in templates/run, has its words and its layout.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from fedhl.names import size
from fedhl.report import plots
from fedhl.report.clients import clients, rank_steps
from fedhl.report.colours import step
from fedhl.report.files import (
    Run,
    best,
    dig,
    final_evaluation,
    headline,
    headline_kinds,
    items,
    natural,
    num,
    series,
    total,
    truncated_name,
)
from fedhl.report.format import call, change_text, metric_text, seconds
from fedhl.report.personal import personal
from fedhl.report.plots import Curve
from fedhl.report.render import View, plot, render
from fedhl.report.statistics import compute_share, mean, phase_seconds, traffic_by_rank
from fedhl.report.tasks import tasks

MOST_SPECTRA = 6
DIAGNOSTICS = {
    "effective_clients": "Effective clients",
    "chi2": "Weights against data shares",
    "aggregation_error": "Aggregation error",
    "step": "Step of W",
    "product_gap": "Product gap",
}
"""Diagnostics of a round, with the titles of their plots."""


def run_page(run: Run, refresh: int | None = None) -> str:
    """The whole page, to be loaded again after `refresh` seconds."""
    return render(
        "run.html",
        {
            "title": run.name,
            "refresh": refresh,
            "metric": run.metric,
            "unit": run.unit,
            "score": partial(metric_text, run.unit),
            "change": partial(change_text, run.unit),
            "rank_steps": rank_steps(run),
            "header": header(run),
            "tiles": tiles(run),
            "quality": quality(run),
            "tasks": tasks(run),
            "clients": clients(run),
            "personal": personal(run),
            "spectrum": spectrum(run),
            "diagnostics": diagnostics(run),
            "costs": costs(run),
            "refused": refused(run),
            "provenance": provenance(run),
        },
    )


def header(run: Run) -> View:
    planned = num(run.summary, "rounds")
    epsilon, delta = (num(run.summary, "privacy", key) for key in ("epsilon", "delta"))
    return {
        "name": run.name,
        "known": bool(run.summary),  # an empty summary says nothing
        "missing": run.summary is None,
        "status": str(dig(run.summary, "status") or "no summary"),
        "reason": dig(run.summary, "reason"),
        "stopped": dig(run.summary, "stopped"),
        "signatures": signatures(run),
        "model": dig(run.summary, "model"),
        "task": str(dig(run.summary, "task") or "").replace("-", " "),
        "data": dig(run.summary, "data"),
        "clients": len(run.clients),
        "ranks": sorted(rank_steps(run)),
        "method": call(dig(run.summary, "method")),
        "weighting": call(dig(run.summary, "weighting")),
        "recorded": bool(run.rounds),
        "done": run.rounds[-1]["round"] if run.rounds else 0,
        "planned": None if planned is None else f"{planned:.0f}",
        "privacy": None
        if epsilon is None or delta is None
        else {"epsilon": epsilon, "delta": delta},
    }


def signatures(run: Run) -> list[View]:
    """The failures that the metrics have shown, each with the round in which it was first seen."""
    return [
        {"round": line["round"], "text": str(text)}
        for line in run.rounds
        for text in (dig(line, "signatures") or {}).values()
    ]


def tiles(run: Run) -> View:
    """The big numbers, each with its context."""

    def sums(group: str, key: str) -> View:
        each = [value for t, value in series(run, group, key) if t > 0]
        return {"total": total(run, group, key), "per_round": mean(each)}

    kinds = [(kind, *headline(run, *keys)) for kind, keys in headline_kinds(run)]
    best_round, best_value = best(run)
    return {
        "quality": [
            {"title": f"{run.metric.capitalize()}, {kind}", "final": final, "since_start": since}
            for kind, final, since in kinds
        ],
        "best": {"round": best_round, "score": best_value},
        "down": sums("bytes", "down"),
        "up": sums("bytes", "up"),
        "wall": sums("seconds", "total"),
        "compute_share": compute_share(run),
        "memory": num(run.summary, "peak_memory_bytes"),
        "device": dig(run.summary, "device"),
    }


def quality(run: Run) -> View:
    """The headline metric per round, the loss beside it, and the final model at each deployed rank."""
    cut = truncated_name(run)
    kinds = (
        ("full W", ("full",), plots.FULL, False),
        (cut, ("truncated",), plots.TRUNCATED, True),
        ("mean client", ("clients", "mean"), plots.INK, False),
        ("worst client", ("clients", "worst"), plots.MUTED, True),
    )
    shown = []
    for metric in dict.fromkeys((run.metric, "loss")):
        curves = [
            Curve(name, series(run, "evaluation", *keys, metric), ink, dashed)
            for name, keys, ink, dashed in kinds
        ]
        curves = [curve for curve in curves if curve.points]
        if any(len(curve.points) > 1 for curve in curves):
            title = f"{metric.capitalize()} per round"
            draw = plots.lines(curves, percent=metric == run.metric and run.unit != "number")
            shown.append(
                {
                    "title": title,
                    "metric": metric,
                    "cut": cut if any(curve.label == cut for curve in curves) else None,
                    "plot": plot(f"quality{len(shown)}", title, draw),
                }
            )
    return {"curves": shown, "deployed": deployed(run)}


def deployed(run: Run) -> list[View]:
    """The scores of the model that each rank would deploy, if it was evaluated."""
    final = final_evaluation(run)[1]
    ranks = dig(final, "ranks") or dig(run.summary, "final", "ranks") or {}
    full = num(final, "full", run.metric)
    known = rank_steps(run)
    rows = []
    for rank in sorted(ranks, key=natural):
        score = num(ranks, rank, run.metric)
        if score is None:
            continue
        number = int(rank) if rank.isdecimal() else None
        rows.append(
            {
                "text": rank,
                "rank": number if number in known else None,
                "order": rank if number is None else float(number),
                "clients": sum(1 for client in run.clients if str(client.rank) == rank),
                "parameters": num(run.summary, "parameters", "trainable", rank),
                "score": score,
                "against": None if full is None else score - full,
                "loss": num(ranks, rank, "loss"),
            }
        )
    return rows


def spectrum(run: Run) -> View:
    usable = []
    for line in run.rounds:
        values = dig(line, "diagnostics", "spectrum")
        values = values if isinstance(values, list) else []
        points = [(j, v) for j, v in enumerate(values, start=1) if (num({"v": v}, "v") or 0) > 0]
        if points:
            usable.append((line["round"], points))
    singular = None
    if usable:
        count = min(MOST_SPECTRA, len(usable))
        picked = sorted({round(i * (len(usable) - 1) / max(count - 1, 1)) for i in range(count)})
        picked = picked if count > 1 else [len(usable) - 1]
        curves = [
            Curve(f"round {usable[j][0]}", usable[j][1], plots.color("t", step(i, len(picked))))
            for i, j in enumerate(picked)
        ]
        ranks = [(rank, plots.color("r", place)) for rank, place in rank_steps(run).items()]
        singular = plot("spectrum", "spectrum", plots.spectrum(curves, ranks), 320)
    panels = []
    for key, title, share in (
        ("effective_rank", "effective rank", False),
        ("tail_share", "tail share", True),
    ):
        if points := series(run, "diagnostics", key):
            panels.append((title, [Curve("", points, plots.FULL)], share))
    rank = plot("rank", "rank of W", plots.panels(panels), 320) if panels else None
    return {"singular": singular, "rank": rank}


def diagnostics(run: Run) -> View:
    """Every diagnostic that was recorded, as a plot and its last value; None for one that was not."""
    energies = [value for _, value in series(run, "diagnostics", "energy")]
    norm = math.sqrt(max(energies)) if energies else 0.0
    # Axes reach at least this high, so that rounding errors look like the zeros they are.
    least = {"chi2": 0.01, "aggregation_error": 1e-3 * norm, "product_gap": 1e-3 * norm}
    found: View = {}
    for key, title in DIAGNOSTICS.items():
        points = series(run, "diagnostics", key)
        if not points:
            found[key] = None
            continue
        curves = [Curve("", points, plots.FULL)]
        if key == "step":
            known = unrelated(run)
            curves = [Curve("W", points, plots.FULL)]
            curves += [Curve("unrelated updates", known, plots.MUTED, True)] if known else []
        if key == "effective_clients":
            cohort = [(float(r["round"]), float(len(items(r, "clients")))) for r in run.rounds]
            cohort = [(t, count) for t, count in cohort if count]
            curves = [Curve("effective", points, plots.FULL)]
            curves += [Curve("cohort", cohort, plots.MUTED, True)] if cohort else []
        draw = plots.lines(curves, zero=True, top=least.get(key) or None)
        drawn = plot(f"diag-{key.replace('_', '-')}", title, draw, 210)
        found[key] = {"title": title, "last": points[-1][1], "plot": drawn}
    missing = [title.lower() for key, title in DIAGNOSTICS.items() if found[key] is None]
    return {"found": found, "missing": missing}


def unrelated(run: Run) -> list[tuple[float, float]]:
    """`√(Σ p_i² d_i²)` of each round: how far W moves if the updates are orthogonal to each other."""
    found = []
    for line in run.rounds:
        moved = [(num(c, "weight"), num(c, "drift")) for c in items(line, "clients")]
        parts = [p * d for p, d in moved if p is not None and d is not None]
        if parts and len(parts) == len(moved):
            found.append((float(line["round"]), math.hypot(*parts)))
    return found


def costs(run: Run) -> View:
    numbers = [line["round"] for line in run.rounds]
    phases = phase_seconds(run)
    spent = None
    if phases:
        parts = [(values, plots.color("q", i)) for i, values in enumerate(phases.values())]
        spent = {
            "legend": [(name, f"q{i}") for i, name in enumerate(phases)],
            "plot": plot("seconds", "seconds", plots.stacked(numbers, parts, seconds)),
        }
    moved = None
    traffic = {k: [num(line, "bytes", k) or 0.0 for line in run.rounds] for k in ("down", "up")}
    if any(sum(values) for values in traffic.values()):
        inks = {"down": 0, "up": 2}
        parts = [(values, plots.color("q", inks[k])) for k, values in traffic.items()]
        moved = {
            "legend": [
                ("server to clients", f"q{inks['down']}"),
                ("clients to server", f"q{inks['up']}"),
            ],
            "plot": plot("bytes", "bytes", plots.stacked(numbers, parts, size)),
        }
    by_rank = [
        {
            "rank": row.rank,
            "clients": row.clients,
            "mean_down": mean(row.down),
            "mean_up": mean(row.up),
            "down": sum(row.down),
            "up": sum(row.up),
        }
        for row in traffic_by_rank(run, rank_steps(run))
    ]
    return {"seconds": spent, "bytes": moved, "ranks": by_rank}


def refused(run: Run) -> list[View]:
    return [
        {"round": line["round"], "id": str(entry.get("id")), "reason": str(entry.get("reason"))}
        for line in run.rounds
        for entry in items(line, "refused")
    ]


def provenance(run: Run) -> View:
    facts: list[tuple[str, Any]] = []
    for key in ("fedhl", "commit", "device", "precision"):
        facts.append((key, dig(run.summary, key)))
    for group in ("seeds", "versions", "hashes"):
        for key, value in (dig(run.summary, group) or {}).items():
            facts.append((f"{key} {group[:-1] if group != 'hashes' else 'hash'}", value))
    return {"known": bool(run.summary), "facts": facts, "config": run.config}
