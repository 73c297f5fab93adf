"""The page of a report: one function per section, from a parsed run to HTML.

Everything read from files is untrusted text: it is escaped, and the content security policy of the page
forbids any request. A section without data becomes a sentence, never an empty plot.
"""

from __future__ import annotations

import math
from functools import partial
from html import escape
from typing import Any

from fedhl.report import plots
from fedhl.report.clients import clients
from fedhl.report.files import (
    Run,
    best,
    compute_share,
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
from fedhl.report.html import (
    Cell,
    card,
    change_text,
    data,
    document,
    grid,
    legend,
    metric_text,
    number,
    percent,
    plot,
    rank_chip,
    rank_steps,
    seconds,
    section,
    settings,
    size,
    table,
)
from fedhl.report.plots import Curve
from fedhl.report.tasks import tasks

MOST_SPECTRA = 6
PHASES = (
    "compute",
    "other training",
    "broadcast",
    "aggregate",
    "diagnostics",
    "evaluate",
    "checkpoint",
)
DIAGNOSTICS = (
    (
        "effective_clients",
        "Effective clients",
        "N<sub>eff</sub> = 1/Σp²: how many equally weighted clients the round amounts to. "
        "Worrying when it collapses: near 1, one client decides alone.",
    ),
    (
        "chi2",
        "Weights against data shares",
        "χ²(p‖q): 0 when each client weighs as much as its data. Worrying when it keeps growing: the model "
        "then fits some clients at the expense of others who hold more data.",
    ),
    (
        "aggregation_error",
        "Aggregation error",
        "Distance between the new W and the exact weighted mean of what the clients learned. "
        "0 = nothing lost; anything visible here is training thrown away.",
    ),
    (
        "product_gap",
        "Product gap",
        "What averaging the factors A and B separately, instead of their products, would have lost. Large "
        "means that only a method which aggregates products is right here.",
    ),
)


def header(run: Run) -> str:
    status = str(dig(run.summary, "status") or "no summary")
    done = run.rounds[-1]["round"] if run.rounds else 0
    planned = num(run.summary, "rounds")
    ranks = sorted(rank_steps(run))
    span = (
        f"of rank {ranks[0]}"
        if len(ranks) == 1
        else f"of ranks {ranks[0]} to {ranks[-1]}"
        if ranks
        else ""
    )
    task = str(dig(run.summary, "task") or "").replace("-", " ")
    parts = [
        "Federated LoRA fine-tuning",
        f" of {dig(run.summary, 'model')}" if dig(run.summary, "model") else "",
        f" for {task}" if task else "",
        f" on {dig(run.summary, 'data')}" if dig(run.summary, "data") else "",
        f" over {len(run.clients)} clients {span}" if run.clients else "",
        f", with method {_call(dig(run.summary, 'method'))}" if run.summary else "",
        f" and {_call(dig(run.summary, 'weighting'))} weights" if run.summary else "",
        f"; {done} of {planned:.0f} rounds done."
        if planned is not None
        else f"; {done} rounds done.",
        *_privacy(run),
    ]
    kind = escape(status) if run.summary else "no"
    notes = []
    if run.summary is None:
        notes.append(
            "summary.json is missing: totals below are sums over the rounds in metrics.jsonl."
        )
    elif status != "finished":
        notes.append("This run is not finished: the page shows the rounds so far.")
    if not run.rounds:
        notes.append("No round has been recorded yet.")
    return (
        f'<header><h1>{escape(run.name)}</h1> <span class="status {kind}">'
        f'{escape(status)}</span><p class="lead">{escape("".join(parts))}</p>'
        + "".join(f'<p class="notice">{note}</p>' for note in notes)
        + "</header>"
    )


def _call(value: Any) -> str:
    """{"name": "truncation", "power": 2} as "truncation (power 2)"."""
    if not isinstance(value, dict):
        return str(value)
    said = settings(value)
    return f"{value.get('name')} ({said})" if said else str(value.get("name"))


def _privacy(run: Run) -> list[str]:
    """One sentence on what was spent of the clients' privacy, if they have any."""
    epsilon, delta = (num(run.summary, "privacy", key) for key in ("epsilon", "delta"))
    if epsilon is None or delta is None:
        return []
    return [f" Client-level differential privacy: ε = {epsilon:.2f} at δ = {delta:g} so far."]


def tiles(run: Run) -> str:
    """The big numbers, each with its context below it."""
    cells = _quality_tiles(run)
    for label, group, key, show in (
        ("Sent to clients", "bytes", "down", size),
        ("Sent by clients", "bytes", "up", size),
        ("Wall time", "seconds", "total", seconds),
    ):
        each = [value for t, value in series(run, group, key) if t > 0]
        note = f"{show(math.fsum(each) / len(each))} per round" if each else "not trained yet"
        cells.append((label, data(total(run, group, key), show), note))
    memory, device = num(run.summary, "peak_memory_bytes"), dig(run.summary, "device")
    cells.append(
        ("Computing", data(compute_share(run), percent), "of round time, without evaluation")
    )
    cells.append(("Peak memory", data(memory, size), f"on {escape(str(device))}" if device else ""))
    tile = '<div class="tile"><h3>{}</h3><p class="big">{}</p><p class="note">{}</p></div>'
    return f'<div class="tiles">{"".join(tile.format(*cell) for cell in cells)}</div>'


def _quality_tiles(run: Run) -> list[tuple[str, str, str]]:
    """The final metric of W and its truncation, or of the clients without server data; the best round."""
    show = partial(metric_text, run)
    cells = []
    for kind, keys in headline_kinds(run):
        value, change = headline(run, *keys)
        since = f"{data(change, partial(change_text, run))} since round 0"
        note = "not measured" if value is None else "" if change is None else since
        cells.append((escape(f"{run.metric.capitalize()}, {kind}"), data(value, show), note))
    number_of_best, value = best(run)
    at = "not measured" if value is None else data(value, show)
    return [*cells, ("Best round", data(number_of_best), at)]


def quality(run: Run) -> str:
    """The headline metric per round, the loss beside it, and the final model at each deployed rank."""
    cut = truncated_name(run)
    kinds = (
        ("full W", ("full",), plots.FULL, False),
        (cut, ("truncated",), plots.TRUNCATED, True),
        ("mean client", ("clients", "mean"), plots.INK, False),
        ("worst client", ("clients", "worst"), plots.MUTED, True),
    )
    cards = []
    for metric in dict.fromkeys((run.metric, "loss")):
        curves = [
            Curve(name, series(run, "evaluation", *keys, metric), ink, dashed)
            for name, keys, ink, dashed in kinds
        ]
        curves = [curve for curve in curves if curve.points]
        if any(len(curve.points) > 1 for curve in curves):
            note = f"On held-out rows; {'lower' if metric == 'loss' else 'higher'} is better."
            if any(curve.label == cut for curve in curves):
                note += f" {escape(cut)}: W cut to the largest rank."
            title = f"{metric.capitalize()} per round"
            draw = plots.lines(curves, percent=metric == "accuracy")
            cards.append(card(escape(title), note, plot(f"quality{len(cards)}", title, draw)))
    note = "" if cards else "Fewer than two rounds were evaluated: there is no curve to draw yet."
    table_kind = "side" if len(cards) == 1 else "table"
    return section("Quality", grid(*cards, *_deployed(run, table_kind)), note=note)


def _deployed(run: Run, kind: str) -> list[str]:
    """The card with the model each rank would deploy, when it was evaluated."""
    final = final_evaluation(run)[1]
    ranks = dig(final, "ranks") or dig(run.summary, "final", "ranks") or {}
    order = sorted((r for r in ranks if num(ranks, r, run.metric) is not None), key=natural)
    if not order:
        return []
    full = num(final, "full", run.metric)
    headers = [
        "Rank",
        "Clients",
        "Trained parameters",
        escape(run.metric.capitalize()),
        "Against full W",
    ]
    rows: list[list[Cell]] = []
    for rank in order:
        value = num(ranks, rank, run.metric)
        known = int(rank) if rank.isdecimal() and int(rank) in rank_steps(run) else None
        chip = rank_chip(run, known) if known is not None else escape(rank)
        against = None if value is None or full is None else value - full
        rows.append(
            [
                (chip, float(rank) if rank.isdecimal() else rank),
                number(sum(1 for c in run.clients if str(c.rank) == rank)),
                number(num(run.summary, "parameters", "trainable", rank)),
                number(value, partial(metric_text, run)),
                number(against, partial(change_text, run)),
            ]
        )
        if run.metric != "loss":
            rows[-1].append(number(num(ranks, rank, "loss"), lambda v: f"{v:.3f}"))
    if run.metric != "loss":
        headers.append("Loss")
    note = "What each client would deploy: the global model cut to its rank, on the same held-out rows."
    return [card("Final model at each rank", note, table(headers, rows), kind)]


def spectrum(run: Run) -> str:
    usable = []
    for line in run.rounds:
        values = dig(line, "diagnostics", "spectrum")
        values = values if isinstance(values, list) else []
        points = [(j, v) for j, v in enumerate(values, start=1) if (num({"v": v}, "v") or 0) > 0]
        if points:
            usable.append((line["round"], points))
    cards = []
    if usable:
        count = min(MOST_SPECTRA, len(usable))
        picked = sorted({round(i * (len(usable) - 1) / max(count - 1, 1)) for i in range(count)})
        picked = picked if count > 1 else [len(usable) - 1]
        curves = [
            Curve(
                f"round {usable[j][0]}", usable[j][1], plots.color("t", plots.step(i, len(picked)))
            )
            for i, j in enumerate(picked)
        ]
        ranks = [(rank, plots.color("r", step)) for rank, step in rank_steps(run).items()]
        note = (
            "Singular values of the global update, all layers together. "
            "A client is sent what is left of its rank's line."
        )
        cards.append(
            card(
                "Spectrum of W",
                note,
                plot("spectrum", "spectrum", plots.spectrum(curves, ranks), 320),
            )
        )
    panels = []
    for key, title, share in (
        ("effective_rank", "effective rank", False),
        ("tail_share", "tail share", True),
    ):
        if points := series(run, "diagnostics", key):
            panels.append((title, [Curve("", points, plots.FULL)], share))
    if panels:
        note = (
            "How many directions W really uses, and the share of ‖W‖² beyond the largest deployed rank: "
            "a high tail share is never sent to anyone, so never corrected."
        )
        cards.append(card("Rank of W", note, plot("rank", "rank of W", plots.panels(panels), 320)))
    if not cards:
        return section(
            "Spectrum of W", note="This run has no spectrum: no global update was recorded."
        )
    return section("Spectrum of W", grid(*cards))


def diagnostics(run: Run) -> str:
    energies = [value for _, value in series(run, "diagnostics", "energy")]
    norm = math.sqrt(max(energies)) if energies else 0.0
    # Axes reach at least this high, so that rounding errors look like the zeros they are.
    least = {"chi2": 0.01, "aggregation_error": 1e-3 * norm, "product_gap": 1e-3 * norm}
    cards, missing = [], []
    for key, title, note in DIAGNOSTICS:
        points = series(run, "diagnostics", key)
        if not points:
            missing.append(title.lower())
            continue
        curves = [Curve("", points, plots.FULL)]
        if key == "effective_clients":
            cohort = [(float(r["round"]), float(len(items(r, "clients")))) for r in run.rounds]
            cohort = [(t, count) for t, count in cohort if count]
            curves = [Curve("effective", points, plots.FULL)]
            curves += [Curve("cohort", cohort, plots.MUTED, True)] if cohort else []
        draw = plots.lines(curves, zero=True, top=least.get(key) or None)
        now = f'{title} <span class="now">{data(points[-1][1])}</span>'
        cards.append(card(now, note, plot(f"diag-{key.replace('_', '-')}", title, draw, 210)))
    note = f"Not recorded in this run: {', '.join(missing)}." if missing else ""
    return section("Federation diagnostics", grid(*cards) if cards else "", note=note)


def costs(run: Run) -> str:
    cards = []
    numbers = [line["round"] for line in run.rounds]
    phases = _phase_seconds(run)
    if phases:
        parts = [(values, plots.color("q", i)) for i, (_, values) in enumerate(phases)]
        key = legend([(name, f"var(--q{i})") for i, (name, _) in enumerate(phases)])
        draw = plots.stacked(numbers, parts, seconds)
        note = "Compute is forward, backward and optimizer, all clients together."
        cards.append(card("Seconds per round", note, key + plot("seconds", "seconds", draw)))
    traffic = {k: [num(line, "bytes", k) or 0.0 for line in run.rounds] for k in ("down", "up")}
    if any(sum(values) for values in traffic.values()):
        names = {"down": "server to clients", "up": "clients to server"}
        inks = {"down": 0, "up": 2}
        key = legend([(names[k], f"var(--q{inks[k]})") for k in traffic])
        draw = plots.stacked(
            numbers, [(v, plots.color("q", inks[k])) for k, v in traffic.items()], size
        )
        cards.append(
            card(
                "Bytes per round",
                "All clients of the round together.",
                key + plot("bytes", "bytes", draw),
            )
        )
    cards += _rank_traffic(run)
    if not cards:
        return section("Bytes and seconds", note="Neither times nor bytes were recorded.")
    return section("Bytes and seconds", grid(*cards))


def _phase_seconds(run: Run) -> list[tuple[str, list[float]]]:
    """Seconds per phase and round, phases that never took time left out; "rest" is what no phase claims."""
    parts: dict[str, list[float]] = {name: [] for name in (*PHASES, "rest")}
    for line in run.rounds:
        spent = {name: num(line, "seconds", name) or 0.0 for name in (*PHASES, "train", "total")}
        spent["other training"] = max(spent["train"] - spent["compute"], 0.0)
        spent["rest"] = max(spent["total"] - sum(spent[name] for name in PHASES), 0.0)
        for name, values in parts.items():
            values.append(spent[name])
    return [(name, values) for name, values in parts.items() if any(values)]


def _rank_traffic(run: Run) -> list[str]:
    rows: list[list[Cell]] = []
    for rank in rank_steps(run):
        those = {c.id: [e for r, _, e in c.by_rank() if r == rank] for c in run.clients}
        entries = [e for found in those.values() for e in found]
        down = [v for e in entries if (v := num(e, "bytes_down")) is not None]
        up = [v for e in entries if (v := num(e, "bytes_up")) is not None]
        if down or up:
            rows.append(
                [
                    (rank_chip(run, rank), rank),
                    number(sum(1 for found in those.values() if found)),
                    number(sum(down) / len(down) if down else None, size),
                    number(sum(up) / len(up) if up else None, size),
                    number(sum(down), size),
                    number(sum(up), size),
                ]
            )
    if not rows:
        return []
    headers = [
        "Rank",
        "Clients",
        "Down per client and round",
        "Up per client and round",
        "Down in all",
        "Up in all",
    ]
    return [card("Bytes by rank", "", table(headers, rows), "table")]


def refused(run: Run) -> str:
    rows: list[list[Cell]] = [
        [
            number(line["round"]),
            (escape(str(entry.get("id"))), str(entry.get("id"))),
            (escape(str(entry.get("reason"))), str(entry.get("reason"))),
        ]
        for line in run.rounds
        for entry in items(line, "refused")
    ]
    if not rows:
        return ""
    counted = "1 update" if len(rows) == 1 else f"{len(rows)} updates"
    note = f"{counted} did not come, or were refused; the rounds went on without."
    return section(
        "Missing or refused", card(note, "", table(["Round", "Client", "Reason"], rows), "table")
    )


def provenance(run: Run) -> str:
    facts: list[tuple[str, Any]] = []
    for key in ("fedhl", "commit", "device", "precision"):
        facts.append((key, dig(run.summary, key)))
    for group in ("seeds", "versions", "hashes"):
        for key, value in (dig(run.summary, group) or {}).items():
            facts.append((f"{key} {group[:-1] if group != 'hashes' else 'hash'}", value))
    shown = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape('unknown' if v is None else str(v))}</dd></div>"
        for k, v in facts
    )
    config = "<p>config.yaml is missing.</p>"
    if run.config is not None:
        config = f"<details><summary>Resolved config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    known = f"<dl>{shown}</dl>" if run.summary else "<p>Unknown: summary.json is missing.</p>"
    return section("Provenance", f'<div class="card table">{known}{config}</div>')


def page(run: Run) -> str:
    """The whole page."""
    parts = (
        header,
        tiles,
        quality,
        tasks,
        clients,
        spectrum,
        diagnostics,
        costs,
        refused,
        provenance,
    )
    return document(run.name, "\n".join(part(run) for part in parts))
