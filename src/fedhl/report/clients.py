"""The section on clients: a sortable table, and what each client weighed, missed, moved and lost."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from html import escape

from fedhl.report import plots
from fedhl.report.files import Client, Run, dig, final_evaluation, items, natural, num
from fedhl.report.html import (
    Cell,
    card,
    data,
    general,
    grid,
    legend,
    metric_text,
    number,
    percent,
    plot,
    rank_chip,
    rank_steps,
    section,
    size,
    table,
)
from fedhl.report.plots import Curve, Draw

MOST_LINES = 12  # clients; beyond, weights are a heatmap
MOST_LABELS = 8  # segments of a label bar


def clients(run: Run) -> str:
    if not run.clients:
        return section("Clients", note="No client has taken part in a round yet.")
    cards = []
    if draw := _weights_plot(run):
        lines = len(run.clients) <= MOST_LINES
        note = "How much each client's update counted. "
        note += (
            "Coloured by rank." if lines else "A row is a client, by rank; blank where it sat out."
        )
        key = _rank_legend(run) if lines else _heat_key(run)
        cards.append(card("Weight", note, key + plot("weight", "weight", draw, 300)))
    for key, title, note, share in (
        (
            "error",
            "Truncation error",
            "Share of ‖W‖² that a client of this rank is not sent.",
            True,
        ),
        (
            "drift",
            "Drift",
            "‖ΔW<sub>i</sub> &minus; sent<sub>i</sub>‖: how far local training moved.",
            False,
        ),
        ("loss", "Training loss", "Mean over the round's local steps.", False),
    ):
        curves = _by_rank(run, key)
        if curves:
            band = (
                " Mean and range of the clients of a rank." if any(c.band for c in curves) else ""
            )
            draw = plots.lines(
                curves, percent=share, zero=key != "loss", top=0.01 if share else None
            )
            cards.append(card(title, note + band, plot(f"client-{key}", title, draw, 300)))
    return section("Clients", _client_table(run), grid(*cards))


def _rank_legend(run: Run) -> str:
    steps = rank_steps(run)
    if len(steps) > 8:
        steps = {
            r: s for i, (r, s) in enumerate(steps.items()) if i % math.ceil(len(steps) / 8) == 0
        }
    return legend([(f"rank {rank}", f"var(--r{step})") for rank, step in steps.items()])


def _heat_key(run: Run) -> str:
    peak = max(
        (w for c in run.clients for e in c.rounds.values() if (w := num(e, "weight")) is not None),
        default=0,
    )
    return f'<p class="heat"><span>0</span><i></i>{data(peak)}</p>'


def _weights_plot(run: Run) -> Draw | None:
    active = [line["round"] for line in run.rounds if items(line, "clients")]
    numbers = range(min(active, default=0), max(active, default=0) + 1)
    if not any(num(e, "weight") is not None for c in run.clients for e in c.rounds.values()):
        return None
    steps = rank_steps(run)
    rows = []
    for client in run.clients:
        found = (num(client.rounds.get(t), "weight") for t in numbers)
        rows.append([math.nan if weight is None else weight for weight in found])
    if len(run.clients) > MOST_LINES:
        sizes = Counter(client.rank for client in run.clients)  # in the order of the rows
        groups = [
            ("" if rank is None else f"rank {rank}", _rank_ink(steps, rank), count)
            for rank, count in sizes.items()
        ]
        return plots.heatmap(rows, numbers, groups)
    curves = [
        Curve(c.id, list(zip(map(float, numbers), row, strict=True)), _rank_ink(steps, c.rank))
        for c, row in zip(run.clients, rows, strict=True)
        if not all(map(math.isnan, row))
    ]
    return plots.lines(curves, zero=True)


def _rank_ink(steps: dict[int, int], rank: int | None) -> str:
    return plots.MUTED if rank is None else plots.color("r", steps[rank])


def _by_rank(run: Run, key: str) -> list[Curve]:
    values: dict[int, dict[int, list[float]]] = {}
    for client in run.clients:
        for rank, t, entry in client.by_rank():
            value = num(entry, key)
            if value is not None:
                values.setdefault(rank, {}).setdefault(t, []).append(value)
    colors = {rank: plots.color("r", step) for rank, step in rank_steps(run).items()}
    return plots.rank_curves(values, colors)


def _client_table(run: Run) -> str:
    labels = _label_order(run)
    scores = dig(final_evaluation(run)[1], "clients", "by_client") or {}
    cohort = {
        line["round"]: sum(num(e, "examples") or 0.0 for e in items(line, "clients"))
        for line in run.rounds
    }
    headers = [
        "Client",
        "Rank",
        "Examples",
        "Rounds",
        "Weight",
        "Data share",
        "",
        "Last error",
        "Mean drift",
    ]
    headers += (
        ["Traffic"]
        + (["Labels"] if labels else [])
        + ([f"Own {escape(run.metric)}"] if scores else [])
    )
    means = [_means(client, cohort) for client in run.clients]
    widest = max((v for pair in means for v in pair if v is not None), default=1.0) or 1.0
    rows: list[list[Cell]] = []
    for client, (weight, share) in zip(run.clients, means, strict=True):
        entries = list(client.rounds.values())
        errors = [v for e in entries if (v := num(e, "error")) is not None]
        drifts = [v for e in entries if (v := num(e, "drift")) is not None]
        traffic = [
            v for e in entries for k in ("bytes_down", "bytes_up") if (v := num(e, k)) is not None
        ]
        row: list[Cell] = [
            (escape(client.id), " ".join(f"{n:09d}{t}" for _, n, t in natural(client.id))),
            (rank_chip(run, client.rank), client.rank),
            number(client.examples),
            number(len(entries)),
            number(weight, lambda v: f"{v:.3f}"),
            number(share, lambda v: f"{v:.3f}"),
            (_bullet(weight, share, widest), weight),
            number(errors[-1] if errors else None, percent),
            number(math.fsum(drifts) / len(drifts) if drifts else None),
            number(sum(traffic) if traffic else None, size),
        ]
        if labels:
            row.append((_label_bar(client, labels), _first_share(client, labels)))
        if scores:
            row.append(number(num(scores, client.id, run.metric), partial(metric_text, run)))
        rows.append(row)
    key = legend([(name, f"var(--q{i})") for i, name in enumerate([*labels])]) if labels else ""
    note = (
        "Weight and data share are means over the rounds a client took part in, within each round's cohort; "
        "the bar is the weight, the tick the data share. Click a heading to sort."
    )
    return card("Who took part", note, key + table(headers, rows, sortable=True), "table")


def _means(client: Client, cohort: dict[int, float]) -> tuple[float | None, float | None]:
    """Mean weight and mean data share of a client over its rounds."""
    weights = [w for e in client.rounds.values() if (w := num(e, "weight")) is not None]
    shares = [
        n / cohort[t]
        for t, e in client.rounds.items()
        if (n := num(e, "examples")) is not None and cohort.get(t)
    ]
    return (
        math.fsum(weights) / len(weights) if weights else None,
        math.fsum(shares) / len(shares) if shares else None,
    )


def _bullet(weight: float | None, share: float | None, widest: float) -> str:
    bar = "" if weight is None else f'<i style="width:{100 * weight / widest:.1f}%"></i>'
    tick = "" if share is None else f'<b style="left:{100 * share / widest:.1f}%"></b>'
    return f'<span class="bullet">{bar}{tick}</span>'


def _label_order(run: Run) -> dict[str, list[str]]:
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


def _label_bar(client: Client, labels: dict[str, list[str]]) -> str:
    whole = sum(client.labels.values())
    if not whole:
        return data(None)
    parts = []
    for i, (name, members) in enumerate(labels.items()):
        count = sum(client.labels.get(label, 0.0) for label in members)
        if count:
            tip = f"{name}: {general(count)} ({percent(count / whole)})"
            width = f"width:{100 * count / whole:.1f}%;background:var(--q{i})"
            parts.append(f'<i style="{width}" title="{escape(tip)}"></i>')
    return f'<span class="labels">{"".join(parts)}</span>'


def _first_share(client: Client, labels: dict[str, list[str]]) -> float:
    first = next(iter(labels.values()))
    return sum(client.labels.get(label, 0.0) for label in first) / (
        sum(client.labels.values()) or 1.0
    )
