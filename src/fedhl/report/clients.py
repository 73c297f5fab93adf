"""The values of the section on clients: a sortable table, and plots of their own metric, weight, truncation
error, drift and loss."""

from __future__ import annotations

import math
from collections import Counter

from fedhl.report import plots
from fedhl.report.colours import step
from fedhl.report.files import Client, Run, dig, final_evaluation, items, natural, num, series
from fedhl.report.format import general, percent
from fedhl.report.plots import Curve, Draw
from fedhl.report.render import View, plot
from fedhl.report.statistics import cohort_examples, mean, mean_data_share, mean_weight, ranges

MOST_LINES = 12  # clients; beyond, weights are a heatmap
MOST_CHIPS = 8  # of ranks in a legend
MOST_LABELS = 8  # segments of a label bar


def clients(run: Run) -> View | None:
    """None until a client has taken part."""
    if not run.clients:
        return None
    labels = label_order(run)
    scores = dig(final_evaluation(run)[1], "clients", "by_client") or {}
    return {
        "rows": client_rows(run, labels, scores),
        "labels": [(name, f"q{i}") for i, name in enumerate(labels)],
        "scored": bool(scores),
        "own": own(run),
        "weight": weight(run),
        "error": by_rank(run, "error", "Truncation error"),
        "drift": by_rank(run, "drift", "Drift"),
        "loss": by_rank(run, "loss", "Training loss"),
    }


# --- the table ----------------------------------------------------------------------------------


def client_rows(run: Run, labels: dict[str, list[str]], scores: View) -> list[View]:
    cohort = cohort_examples(run)
    means = [(mean_weight(client), mean_data_share(client, cohort)) for client in run.clients]
    widest = max((v for pair in means for v in pair if v is not None), default=1.0) or 1.0
    rows = []
    for client, (weight, share) in zip(run.clients, means, strict=True):
        entries = list(client.rounds.values())
        errors = [v for e in entries if (v := num(e, "error")) is not None]
        traffic = [
            v for e in entries for k in ("bytes_down", "bytes_up") if (v := num(e, k)) is not None
        ]
        rows.append(
            {
                "id": client.id,
                "order": " ".join(f"{n:09d}{t}" for _, n, t in natural(client.id)),
                "rank": client.rank,
                "examples": client.examples,
                "rounds": len(entries),
                "weight": weight,
                "share": share,
                "bar": None if weight is None else 100 * weight / widest,
                "tick": None if share is None else 100 * share / widest,
                "error": errors[-1] if errors else None,
                "drift": mean(num(e, "drift") for e in entries),
                "traffic": sum(traffic) if traffic else None,
                "segments": label_segments(client, labels),
                "first_share": first_share(client, labels),
                "score": num(scores, client.id, run.metric),
                "held_out": num(scores, client.id, "examples"),
            }
        )
    return rows


def label_order(run: Run) -> dict[str, list[str]]:
    """{segment name: labels in it}, at most MOST_LABELS segments: the rarest labels share the last."""
    counts: dict[str, float] = {}
    for client in run.clients:
        for label, count in client.labels.items():
            counts[label] = counts.get(label, 0.0) + count
    common = sorted(counts, key=lambda label: (-counts[label], natural(label)))
    kept = common if len(common) <= MOST_LABELS else common[: MOST_LABELS - 1]
    order = {label: [label] for label in sorted(kept, key=natural)}
    rest = common[len(kept) :]
    return order | {f"{len(rest)} others": rest} if rest else order


def label_segments(client: Client, labels: dict[str, list[str]]) -> list[View]:
    """A client's label bar: the width of each segment in percent, its colour, and its text."""
    whole = sum(client.labels.values())
    segments = []
    for i, (name, members) in enumerate(labels.items()):
        count = sum(client.labels.get(label, 0.0) for label in members)
        if count:
            tip = f"{name}: {general(count)} ({percent(count / whole)})"
            segments.append({"width": 100 * count / whole, "ink": f"q{i}", "tip": tip})
    return segments


def first_share(client: Client, labels: dict[str, list[str]]) -> float | None:
    """The share of the first segment, by which the label bars are sorted."""
    if not labels:
        return None
    first = next(iter(labels.values()))
    whole = sum(client.labels.values()) or 1.0
    return sum(client.labels.get(label, 0.0) for label in first) / whole


# --- the plots ----------------------------------------------------------------------------------


def rank_steps(run: Run) -> dict[int, int]:
    """Every rank that occurs, with its place on the colour ramp."""
    ranks = {c.rank for c in run.clients if c.rank is not None}
    ranks = sorted(ranks | {rank for c in run.clients for rank, _, _ in c.by_rank()})
    return {rank: step(i, len(ranks)) for i, rank in enumerate(ranks)}


def weight(run: Run) -> View | None:
    """Each client's weight per round: a line for each client if they are few, a heatmap if they are many."""
    weights = [
        found
        for client in run.clients
        for entry in client.rounds.values()
        if (found := num(entry, "weight")) is not None
    ]
    if not weights:
        return None
    return {
        "plot": plot("weight", "weight", weight_plot(run), 300),
        "lines": len(run.clients) <= MOST_LINES,
        "legend": rank_legend(run),
        "peak": max(weights),
    }


def weight_plot(run: Run) -> Draw:
    active = [line["round"] for line in run.rounds if items(line, "clients")]
    numbers = range(min(active, default=0), max(active, default=0) + 1)
    steps = rank_steps(run)
    rows = []
    for client in run.clients:
        found = (num(client.rounds.get(t), "weight") for t in numbers)
        rows.append([math.nan if weight is None else weight for weight in found])
    if len(run.clients) > MOST_LINES:
        sizes = Counter(client.rank for client in run.clients)  # in the order of the rows
        groups = [
            ("" if rank is None else f"rank {rank}", rank_ink(steps, rank), count)
            for rank, count in sizes.items()
        ]
        return plots.heatmap(rows, numbers, groups)
    curves = [
        Curve(c.id, list(zip(map(float, numbers), row, strict=True)), rank_ink(steps, c.rank))
        for c, row in zip(run.clients, rows, strict=True)
        if not all(map(math.isnan, row))
    ]
    return plots.lines(curves, zero=True)


def own(run: Run) -> View | None:
    """Each client's metric on its own rows per round: a line for each client if they are few, a band for each
    rank if they are many; None if it was measured less than twice."""
    steps, curves = rank_steps(run), []
    by_rank: dict[int | None, dict[float, list[float]]] = {}
    for client in run.clients:
        keys = ("evaluation", "clients", "by_client", client.id, run.metric)
        points = series(run, *keys)
        if len(points) > 1:
            curves.append(Curve(client.id, points, rank_ink(steps, client.rank)))
        for t, value in points:
            by_rank.setdefault(client.rank, {}).setdefault(t, []).append(value)
    if not curves:
        return None
    lines = len(run.clients) <= MOST_LINES
    if not lines:
        curves = []
        for rank, values in sorted(by_rank.items(), key=lambda each: each[0] or 0):
            found = ranges(values)
            band = [(each.round, each.low, each.high) for each in found]
            points = [(each.round, each.mean) for each in found]
            curves.append(Curve(f"rank {rank}", points, rank_ink(steps, rank), band=band))
    draw = plots.lines(curves, percent=run.unit != "number")
    title = f"Own {run.metric} per round"
    return {
        "plot": plot("client-own", title, draw, 300),
        "lines": lines,
        "legend": rank_legend(run),
    }


def rank_legend(run: Run) -> list[tuple[str, str]]:
    steps = rank_steps(run)
    every = math.ceil(len(steps) / MOST_CHIPS)
    return [
        (f"rank {rank}", f"r{place}")
        for i, (rank, place) in enumerate(steps.items())
        if i % every == 0
    ]


def rank_ink(steps: dict[int, int], rank: int | None) -> str:
    return plots.MUTED if rank is None else plots.color("r", steps[rank])


def by_rank(run: Run, key: str, title: str) -> View | None:
    """One curve for each rank: the mean over its clients, with a band from the least to the largest."""
    values: dict[int, dict[float, list[float]]] = {}
    for client in run.clients:
        for rank, t, entry in client.by_rank():
            value = num(entry, key)
            if value is not None:
                values.setdefault(rank, {}).setdefault(float(t), []).append(value)
    if not values:
        return None
    curves = []
    steps = rank_steps(run)
    for rank, by_round in sorted(values.items()):
        found = ranges(by_round)
        wide = any(each.high > each.low for each in found)
        band = [(each.round, each.low, each.high) for each in found] if wide else []
        points = [(each.round, each.mean) for each in found]
        curves.append(Curve(f"rank {rank}", points, rank_ink(steps, rank), band=band))
    share = key == "error"
    draw = plots.lines(curves, percent=share, zero=key != "loss", top=0.01 if share else None)
    return {
        "plot": plot(f"client-{key}", title, draw, 300),
        "band": any(curve.band for curve in curves),
    }
