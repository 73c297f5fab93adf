"""Numbers as people read them, and the pieces of HTML that the sections of a report are made of."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fedhl.report import plots
from fedhl.report.files import Run
from fedhl.report.plots import Draw
from fedhl.report.style import SCRIPT, STYLE

MINUS = "\u2212"
WIDE, NARROW = 520, 340  # widths at which every plot is drawn; the style sheet shows one of them
LEFT = ("Rank", "Labels", "Round", "")  # columns that align left, whatever they are sorted by
Cell = tuple[str, float | str | None]  # HTML, and what to sort by


def general(value: float) -> str:
    """Three significant digits; whole numbers in full."""
    text = (
        f"{value:,.0f}"
        if float(value).is_integer() and abs(value) < 1e9
        else f"{value:#.3g}".rstrip(".")
    )
    mantissa, _, exponent = text.partition("e")
    if exponent:
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{mantissa}×10{power}"
    return text.replace("-", MINUS)


def settings(choice: Mapping[str, Any]) -> str:
    """{"name": "truncation", "power": 2, "share": None} as "power 2": what is off or not set goes unsaid."""
    said = {k: x for k, x in choice.items() if k != "name" and x is not None and x is not False}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def percent(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", MINUS)


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def seconds(value: float) -> str:
    if value < 99.5:
        return f"{value:.3g} s"
    minutes, hours = round(value / 60, 1), value / 3600
    return f"{hours:.1f} h" if minutes >= 99.5 else f"{minutes:.1f} min"


def metric_text(run: Run, value: float) -> str:
    return percent(value) if run.metric == "accuracy" else f"{value:.3f}".replace("-", MINUS)


def change_text(run: Run, change: float) -> str:
    sign = "+" if change >= 0 else MINUS
    points = run.metric == "accuracy"
    return f"{sign}{100 * abs(change):.1f} points" if points else f"{sign}{abs(change):.3f}"


def data(value: float | None, show: Callable[[float], str] = general) -> str:
    """A number with its exact value in the markup; a dash for a missing one."""
    if value is None:
        return '<span class="none">–</span>'
    return f'<data value="{value!r}">{escape(show(value))}</data>'


def card(title: str, note: str, body: str, kind: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<div class="card {kind}"><h3>{title}</h3>{note}{body}</div>'


def plot(name: str, title: str, draw: Draw, height: int = 250) -> str:
    """A plot at both widths; its name makes the ids inside unique on the page."""
    wide = plots.svg(draw, WIDE, height, f"{name}-w", escape(title))
    narrow = plots.svg(draw, NARROW, height, f"{name}-n", escape(title))
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(text, CSS colour) chips."""
    chips = (f'<li><i style="background:{ink}"></i>{escape(text)}</li>' for text, ink in entries)
    return f'<ul class="legend">{"".join(chips)}</ul>'


def section(title: str, *blocks: str, note: str = "") -> str:
    note = f'<p class="lead">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{note}{''.join(blocks)}</section>"


def grid(*cards: str) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = False) -> str:
    """A table whose numbers align right and LEFT columns left; headers of a sortable one are buttons."""
    columns = zip(*rows, strict=True)
    texts = (
        h in LEFT or any(isinstance(key, str) for _, key in c)
        for h, c in zip(headers, columns, strict=True)
    )
    kinds = ["" if text else ' class="n"' for text in texts]
    heads = (f'<button type="button">{h}</button>' if sortable and h else h for h in headers)
    head = "".join(f'<th scope="col"{k}>{h}</th>' for h, k in zip(heads, kinds, strict=True))
    body = []
    for row in rows:
        keys = ("" if key is None else f' data-v="{escape(str(key))}"' for _, key in row)
        cells = zip(row, keys, kinds, strict=True)
        body.append(f"<tr>{''.join(f'<td{k}{v}>{text}</td>' for (text, _), v, k in cells)}</tr>")
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def number(value: float | None, show: Callable[[float], str] = general) -> Cell:
    return data(value, show), value


def rank_steps(run: Run) -> dict[int, int]:
    """Every rank that occurs, with its place on the colour ramp."""
    ranks = {c.rank for c in run.clients if c.rank is not None}
    ranks = sorted(ranks | {rank for c in run.clients for rank, _, _ in c.by_rank()})
    return {rank: plots.step(i, len(ranks)) for i, rank in enumerate(ranks)}


def rank_chip(run: Run, rank: int | None) -> str:
    if rank is None:
        return data(None)
    return f'<i class="chip" style="background:var(--r{rank_steps(run)[rank]})"></i>{data(rank)}'


def document(title: str, body: str) -> str:
    """A whole page that loads nothing: no request is allowed, and no script but our own."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · fedhl</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body>\n</html>\n"
    )
