"""The page of a comparison: one function per section, from its runs to HTML.

Text from files is escaped, as in `page.py`. A section without data becomes a sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from html import escape
from urllib.parse import quote

from fedhl.report import plots
from fedhl.report.compare import (
    COSTS,
    CURVES,
    KINDS,
    Comparison,
    Trial,
    Variant,
    amount,
    loss,
    mean_interval,
    span,
    spread_text,
)
from fedhl.report.files import dig, series
from fedhl.report.html import (
    Cell,
    card,
    data,
    document,
    grid,
    number,
    plot,
    section,
    settings,
    table,
)
from fedhl.report.plots import Curve, Dots
from fedhl.report.style import CATEGORIES

UNEQUAL = (
    "data",
    "partition",
    "participation",
    "training.steps",
    "training.epochs",
    "evaluation.client",
)
"""Settings of a variant that change what it trains on, or how much."""
MOST_LINES = len(CATEGORIES)  # variants in one plot of curves; beyond, each has a plot of its own
SMALL = (240, 150)


def ink(index: int) -> str:
    return plots.color("q", index % len(CATEGORIES))


def chip(index: int) -> str:
    return f'<i class="chip" style="background:var(--q{index % len(CATEGORIES)})"></i>'


def name(kind: str) -> str:
    return "T<sub>r max</sub>(W)" if kind == "truncated" else KINDS[kind]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def header(comparison: Comparison) -> str:
    done, planned = comparison.finished
    status = "finished" if done == planned else "running"
    seeds = ", ".join(str(seed) for seed in comparison.plan["seeds"])
    config = comparison.plan["config"]
    lead = (
        f"{len(comparison.variants)} ways of federated LoRA fine-tuning of {dig(config, 'model', 'source')} "
        f"on {dig(config, 'data', 'source')}, {dig(config, 'rounds')} rounds, with seeds {seeds}. A seed "
        "draws the clients, the cohorts, the batches and the initial adapter, alike for all variants."
    )
    notes = []
    if done < planned:
        notes.append(f"{done} of {planned} runs are finished: means are over those.")
    for variant in comparison.variants:
        for kind in comparison.kinds:
            values = variant.values(kind, comparison.metric)
            if None in values:
                notes.append(
                    f"{variant.text}: not every seed ended with a finite {comparison.metric} of "
                    f"{KINDS[kind]}, so no mean is shown."
                )
    if comparison.plan["rates"] and "mean" in comparison.kinds:
        notes.append(
            "Where there is no full W, the learning rate was chosen on the rows that the clients hold "
            "back, on which the mean client is measured, too."
        )
    runs = [run for variant in comparison.variants for run in variant.finished]
    weightings = {json.dumps(v.weighting) for v in comparison.variants if v.weighting}
    if len(weightings) > 1:
        notes.append(
            "The variants differ in how clients are weighted, too: a difference is that of both. With "
            "--weighting all have one."
        )
    for variant in comparison.variants:
        if own := [part for part in variant.text.split("@")[1:] if part.startswith(UNEQUAL)]:
            notes.append(f"{variant.text} does not have the same conditions: {', '.join(own)}.")
    for what, keys in {
        "commit": ("commit",),
        "model": ("hashes", "model"),
        "data": ("hashes", "data"),
        "PyTorch": ("versions", "torch"),
        "device": ("device",),
    }.items():
        found = sorted({str(dig(run.summary, *keys) or "unknown") for run in runs})
        if len(found) > 1:
            notes.append(f"The runs do not share one {what}: {', '.join(found)}.")
    return (
        f'<header><h1>{escape(comparison.name)}: comparison</h1> <span class="status {status}">'
        f'{done} of {planned} runs</span><p class="lead">{escape(lead)}</p>'
        + "".join(f'<p class="notice">{escape(note)}</p>' for note in notes)
        + "</header>"
    )


def spread(metric: str, values: Sequence[float | None], difference: bool = False) -> Cell:
    """The mean and the half-width of its interval; sorted by the mean."""
    mean, half = mean_interval(values)
    if mean is None:
        return data(None), None
    text = spread_text(metric, mean, half)
    if difference:
        text = ("" if mean < 0 else "+") + text.replace("%", " points")
    return f'<data value="{mean!r}">{escape(text)}</data>', mean


def label(index: int, variant: Variant) -> Cell:
    """Its colour, its number in every table and plot, and its name."""
    return f"{chip(index)}{data(index + 1)} {escape(variant.text)}", variant.text


def overview(comparison: Comparison) -> str:
    """What the final models of each variant are worth, and what they cost."""
    metric, kinds = comparison.metric, [*comparison.kinds, "smallest"]
    kinds = [kind for kind in kinds if any(v.values(kind, metric) for v in comparison.variants)]
    quality: list[list[Cell]] = []
    costs: list[list[Cell]] = []
    for i, variant in enumerate(comparison.variants):
        differences = comparison.differences(variant) if i else []
        costly = [(variant.cost(group, key), unit) for group, key, unit in COSTS.values()]
        quality.append(
            [
                label(i, variant),
                _weighting(variant),
                number(len(variant.finished)),
                *(spread(metric, variant.values(kind, metric)) for kind in kinds),
                spread(metric, differences, difference=True),
                *([] if metric == "loss" else [spread("loss", loss(variant, comparison))]),
            ]
        )
        costs.append(
            [
                label(i, variant),
                (escape(span(variant.ranks)), ""),
                *(number(None if v is None else v / unit, amount) for v, unit in costly),
                number(variant.rate, lambda rate: f"{rate:g}"),
            ]
        )
    first = escape(comparison.variants[0].text)
    headers = [
        "Variant",
        "Weighting",
        "Seeds",
        *(capital(name(kind)) for kind in kinds),
        f"Against {first}",
    ]
    headers += [] if metric == "loss" else ["Loss"]
    note = (
        "Means over seeds with 95% intervals (Student's t). "
        f"Against {first}: the difference in {escape(metric)} of {name(comparison.common)}, seed by seed, "
        "which is often known better than either mean. Click a heading to sort."
    )
    title = f"Final {escape(metric)}"
    return section(
        "Results",
        card(title, note, table(headers, quality, True), "table whole"),
        card(
            "Costs and settings",
            "Bytes and seconds of a whole run, means over seeds.",
            table(["Variant", "Ranks", *COSTS, "Learning rate"], costs, True),
            "table whole",
        ),
    )


def _weighting(variant: Variant) -> Cell:
    if variant.weighting is None:
        return data(None), ""
    named = str(variant.weighting.get("name"))
    return f'<span title="{escape(settings(variant.weighting))}">{escape(named)}</span>', named


def final(comparison: Comparison) -> str:
    """Every seed's final model as a dot; and what it took to get there."""
    metric, kind = comparison.metric, comparison.common
    percent, rows, groups = metric == "accuracy", [], []
    for i, variant in enumerate(comparison.variants):
        mean, half = mean_interval(variant.values(kind, metric))
        values = [value for value in variant.values(kind, metric) if value is not None]
        if values:
            rows.append(Dots(f"{i + 1}  {variant.text}", values, ink(i), mean, half))
        moved = [(_moved(t), t.score(kind, metric)) for t in variant.trials if t.finished]
        points = [(bytes / 2**20, y) for bytes, y in moved if bytes is not None and y is not None]
        if points:
            groups.append(Curve(str(i + 1), points, ink(i)))
    if not rows:
        return section("Final models", note="No run has been evaluated yet.")
    title = f"Final {metric} by seed"
    note = (
        f"Of {name(kind)}: a dot is a seed, the tick their mean, the bar its 95% interval "
        "(cut off where it is wider than the plot)."
    )
    lacking = [v.text for v in comparison.variants if v.finished and not v.values(kind, metric)]
    if lacking:
        note += f" Without one: {escape(', '.join(lacking))}."
    draw = plots.strips(rows, percent=percent)
    height = max(250, 50 + 36 * len(rows))
    cards = [card(escape(title), note, plot("seeds", title, draw, height))]
    if groups:
        title = f"Bytes against final {metric}"
        note = (
            "All bytes of a run, down and up. The large dot is the mean over seeds, with the number of "
            f"its row above; the best is at the {'upper' if percent else 'lower'} left."
        )
        draw = plots.scatter(groups, "MiB of a run", percent=percent)
        cards.append(card(escape(title), note, plot("bytes", title, draw, height)))
    return section("Final models", grid(*cards))


def _moved(trial: Trial) -> float | None:
    both = [trial.total("bytes", way) for way in ("down", "up")]
    return None if None in both else math.fsum(value for value in both if value is not None)


def curves(comparison: Comparison) -> str:
    """The headline metric per round: the mean over seeds with their range, for W and its truncation."""
    metric, cards = comparison.metric, []
    percent = metric == "accuracy"
    for kind in comparison.kinds:
        found = [
            _curve(f"{i + 1}", variant, kind, metric, ink(i))
            for i, variant in enumerate(comparison.variants)
        ]
        drawn = [curve for curve in found if len(curve.points) > 2]
        if not drawn:
            continue
        title = f"{metric.capitalize()} per round, {KINDS[kind]}"
        heading = f"{escape(metric.capitalize())} per round, {name(kind)}"
        if len(comparison.variants) > MOST_LINES:
            cards.append(_multiples(comparison, found, kind, heading, percent))
            continue
        texts = [
            f"{curve.label} {comparison.variants[int(curve.label) - 1].text}" for curve in drawn
        ]
        chips = "".join(
            f"<li>{chip(int(curve.label) - 1)}{escape(text)}</li>"
            for curve, text in zip(drawn, texts, strict=True)
        )
        note = "Mean over the seeds, and their range. Numbers are those of the rows above."
        body = f'<ul class="legend">{chips}</ul>' + plot(
            f"curve-{kind}", title, plots.lines(drawn, percent=percent), 300
        )
        cards.append(card(heading, note, body))
    if not cards:
        return section(
            "Learning curves",
            note="Too few rounds were evaluated to draw a curve: lower evaluation.every.",
        )
    return section("Learning curves", grid(*cards))


def _curve(label: str, variant: Variant, kind: str, metric: str, color: str) -> Curve:
    """The rounds in which every finished run has a value."""
    runs = [dict(series(run, "evaluation", *CURVES[kind], metric)) for run in variant.finished]
    rounds = sorted(set(runs[0]).intersection(*runs)) if runs else []
    values = [(t, [run[t] for run in runs]) for t in rounds]
    band = [(t, min(v), max(v)) for t, v in values] if len(runs) > 1 else []
    return Curve(label, [(t, math.fsum(v) / len(v)) for t, v in values], color, band=band)


def _multiples(
    comparison: Comparison, found: Sequence[Curve], kind: str, heading: str, percent: bool
) -> str:
    """Too many lines for one plot: a small plot for each, over the mean and the range of them all."""
    by_round: dict[float, list[float]] = {}
    for t, value in (point for curve in found for point in curve.points):
        by_round.setdefault(t, []).append(value)
    means = [(t, math.fsum(v) / len(v)) for t, v in sorted(by_round.items())]
    band = [(t, min(v), max(v)) for t, v in sorted(by_round.items())]
    everyone = Curve("", means, plots.MUTED, True, band)
    parts = []
    for i, curve in enumerate(found):
        if len(curve.points) < 2:
            continue
        text = f"{i + 1} {comparison.variants[i].text}"
        own = Curve("", curve.points, curve.color, band=curve.band)
        draw = plots.lines([own, everyone], percent=percent)
        drawn = plots.svg(draw, *SMALL, f"curve-{kind}-{i}", escape(text))
        parts.append(f"<figure><figcaption>{chip(i)}{escape(text)}</figcaption>{drawn}</figure>")
    note = "Mean over the seeds, and their range; grey: mean and range of all variants."
    return card(heading, note, f'<div class="multiples">{"".join(parts)}</div>', "table")


def rates(comparison: Comparison) -> str:
    """What chose the learning rates; nothing if they were not chosen."""
    grid_rates: list[float] = comparison.plan["rates"]
    if not grid_rates:
        return ""
    metric = comparison.metric
    rows: list[list[Cell]] = []
    for i, variant in enumerate(comparison.variants):
        row: list[Cell] = [label(i, variant)]
        for trial in variant.grid:
            value = comparison.validation(trial).get(metric)
            shown = data(value, lambda v: spread_text(metric, v, None))
            row.append((f"<b>{shown}</b>" if trial.rate == variant.rate else shown, value))
        edge = variant.rate in (min(grid_rates), max(grid_rates)) and len(grid_rates) > 1
        text = (
            "–" if variant.rate is None else f"{variant.rate:g}" + (", at the edge" if edge else "")
        )
        rows.append([*row, (escape(text), "")])
    where = {
        "validation": "the server's validation rows, of the full W",
        "clients": "rows that the clients hold back (mean over clients)",
    }[comparison.plan["chosen_on"]]
    note = (
        f"Final {escape(metric)} on {where}, with seed {comparison.plan['seeds'][0]}; the best was chosen, "
        "equals by their loss. The server's held-out rows had no part in it. A choice at the edge of the "
        "grid may not be the best there is."
    )
    headers = ["Variant", *(f"{rate:g}" for rate in grid_rates), "Chosen"]
    body = card("Grid and choice", note, table(headers, rows), "table whole")
    return section("Learning rates", body)


def runs(comparison: Comparison) -> str:
    """One row per run, with a link to its own report."""
    metric, kinds = comparison.metric, comparison.kinds
    show = partial(spread_text, metric, half=None)
    rows: list[list[Cell]] = []
    for i, variant in enumerate(comparison.variants):
        for trial in variant.trials:
            summary = trial.run.summary if trial.run else None
            status = escape(trial.status)
            if trial.folder and trial.finished:
                status = f'<a href="{escape(quote(trial.folder))}/report.html">{status}</a>'
            hash = str(dig(summary, "hashes", "config") or "")[:12]
            rounds = trial.run.rounds[-1]["round"] if trial.run and trial.run.rounds else None
            rows.append(
                [
                    label(i, variant),
                    number(trial.seed),
                    (status, trial.status),
                    number(rounds),
                    *(
                        number(trial.score(kind, metric) if trial.finished else None, show)
                        for kind in kinds
                    ),
                    number(trial.total("seconds", "total"), amount),
                    (escape(str(dig(summary, "commit") or "–")), ""),
                    (f"<code>{escape(hash) or '–'}</code>", ""),
                ]
            )
    title = escape(metric.capitalize())
    headers = ["Variant", "Seed", "Status", "Rounds", *(f"{title}, {name(kind)}" for kind in kinds)]
    headers += ["Seconds", "Commit", "Config"]
    return section(
        "Runs",
        card(
            "By seed",
            "The status leads to the run's own report.",
            table(headers, rows, True),
            "table",
        ),
    )


def provenance(comparison: Comparison) -> str:
    config = json.dumps(comparison.plan["config"], indent=1, ensure_ascii=False)
    run = next((run for variant in comparison.variants for run in variant.finished), None)
    facts = {f"{k} version": v for k, v in (dig(run and run.summary, "versions") or {}).items()}
    facts |= {
        f"{k} hash": v
        for k, v in (dig(run and run.summary, "hashes") or {}).items()
        if k != "config"
    }
    facts |= {key: dig(run and run.summary, key) for key in ("fedhl", "device", "precision")}
    shown = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape('unknown' if value is None else str(value))}</dd></div>"
        for key, value in facts.items()
    )
    text = f"<details><summary>The config that variants change</summary><pre>{escape(config)}</pre></details>"
    facts_of = "<p class='note'>Of the first finished run.</p>" if run else ""
    return section("Provenance", f'<div class="card table">{facts_of}<dl>{shown}</dl>{text}</div>')


def page(comparison: Comparison) -> str:
    """The whole page."""
    parts = (header, overview, final, curves, rates, runs, provenance)
    body = "\n".join(part(comparison) for part in parts)
    return document(f"{comparison.name}: comparison", body)
