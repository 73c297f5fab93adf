"""The plots of a report: numbers in, inline SVG out.

Every plot is a function `draw(figure)`. `svgs` renders it with Matplotlib and then replaces a few reserved
colours by CSS variables, so that one drawing follows the light and the dark scheme of the page around it.
Text stays text. Nothing here knows about federations, or reads a file.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedhl.report.layout import FONT, ApartLocator, arrange

Draw = Callable[[Figure], None]
Points = Sequence[tuple[float, float]]

# Reserved colours, "#a9" + family + index, become the CSS variables --<family><index>.
FAMILIES = {"c": 1, "q": 2, "r": 3, "t": 4}
HEAT = (59, 125, 216)  # of the heatmap: opaque for the largest value, nearly transparent for 0
HEAT_ALPHA = 0.10

RC: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a client may be called "$x"
    "font.family": "DejaVu Sans",  # ships with Matplotlib: the layout is the same everywhere
    "font.size": FONT,
    "axes.unicode_minus": True,
    "axes.titley": 1.0,  # where Matplotlib puts titles in the end, which costs it a look at every text
    "path.simplify": False,
}


def color(family: str, index: int = 0) -> str:
    """The reserved colour that becomes `var(--<family><index>)`; only for drawings passed to `svgs`."""
    return f"#a9{FAMILIES[family]:02x}{index:02x}"


INK, MUTED, GRID, FULL, TRUNCATED = (color("c", i) for i in range(5))


@dataclass(frozen=True)
class Curve:
    """A line with its direct label; `band` is (x, low, high) per point, NaN breaks the line."""

    label: str
    points: Points
    color: str
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


def svgs(draw: Draw, widths: Sequence[int], height: int, name: str, label: str) -> list[str]:
    """Draw once, and render at each width in CSS pixels; ids begin with the name, which is one of a page."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(widths[0] / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        draw(figure)
        return [svg(figure, width, height, f"{name}-{width}", label) for width in widths]


def svg(figure: Figure, width: int, height: int, prefix: str, label: str) -> str:
    figure.set_size_inches(width / 72, height / 72)
    arrange(figure.axes, width, height)
    out = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    matplotlib.rcParams["svg.hashsalt"] = prefix
    # not savefig, which draws everything twice
    FigureCanvasSVG(figure).print_svg(out, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<[^>]*>", lambda tag: inline_tag(tag.group(), prefix), text)
    head = f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)


def inline_tag(tag: str, prefix: str) -> str:
    """One SVG tag as part of an HTML page: unique ids, CSS variables for colours, two decimals."""
    names = {index: family for family, index in FAMILIES.items()}
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(
        r"#a9([0-9a-f]{2})([0-9a-f]{2})",
        lambda m: f"var(--{names[int(m[1], 16)]}{int(m[2], 16)})",
        tag,
    )
    if tag.startswith("<path"):
        tag = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag)
    return tag


def new_axes(figure: Figure) -> Axes:
    """Axes with horizontal grid lines only, and no box; their place is found at the end."""
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    ax.patch.set_visible(False)
    for side in ("top", "left", "right"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, pad=5, colors=MUTED, labelsize=FONT)
    return ax


def round_axis(ax: Axes, rounds: Sequence[float], margin: float = 0.0, label: bool = True) -> None:
    """Integer ticks from the first to the last round, which sit on the edges of the axes."""
    low, high = min(rounds), max(rounds)
    pad = margin or 0.02 * (high - low) or 0.5
    ax.set_xlim(low - pad, high + pad)
    ax.xaxis.set_major_locator(
        MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    if label:
        ax.set_xlabel("round", color=MUTED, fontsize=FONT)
    else:
        ax.tick_params(labelbottom=False)


def value_axis(ax: Axes, percent: bool, zero: bool, top: float | None, ticks: int = 5) -> None:
    """Ticks of the y axis; `zero` starts it at 0, `top` is the least upper end it may have."""
    low, high = ax.get_ylim()
    if zero:
        low, high = 0.0, high if high > 0 else 1.0
    if top is not None:
        high = max(high, top)
    ax.set_ylim(low, high)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move labels at `values` in [0, 1] apart to a distance of `gap`, keeping their order."""
    order = sorted(range(len(values)), key=lambda i: (values[i], -i))
    blocks: list[
        tuple[float, int]
    ] = []  # (mean of value - place * gap, labels): isotonic regression
    for place, i in enumerate(order):
        mean, count = values[i] - place * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    placed = [max(mean, 0.0) + place * gap for place, mean in enumerate(means)]
    limit = 1.0 + gap / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    result = [0.0] * len(values)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """Write each curve's label, (y, text, colour), right of the axes; thin them out if they do not fit."""
    gap = (FONT + 2.5) / height
    fits = max(2, int(1 / gap))
    if len(ends) > fits:
        ordered = sorted(ends)
        ends = [ordered[round(i * (len(ends) - 1) / (fits - 1))] for i in range(fits)]
    to_axes = ax.transScale + ax.transLimits
    fractions = [float(to_axes.transform((1.0, y))[1]) for y, _, _ in ends]
    for place, (_, text, ink) in zip(spread(fractions, gap), ends, strict=True):
        ax.annotate(
            text if len(text) <= 18 else text[:17] + "…",
            (1.0, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=ink,
            annotation_clip=False,
        )


def lines(
    curves: Sequence[Curve], *, percent: bool = False, zero: bool = False, top: float | None = None
) -> Draw:
    """Curves over rounds, each labelled at its right end."""

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        draw_curves(ax, curves, percent, zero, top, figure.get_figheight() * 72 - 46)

    return draw


def panels(parts: Sequence[tuple[str, Sequence[Curve], bool]]) -> Draw:
    """Stacked axes over the same rounds: (title, curves, percent) each; y starts at 0."""

    def draw(figure: Figure) -> None:
        rounds = [x for _, curves, _ in parts for curve in curves for x, _ in curve.points]
        height = figure.get_figheight() * 72 / len(parts) - 46
        for i, (title, curves, percent) in enumerate(parts):
            ax = new_axes(figure)
            top = 0.01 if percent else None
            draw_curves(ax, curves, percent, True, top, height, 3, label=i == len(parts) - 1)
            round_axis(ax, rounds, label=i == len(parts) - 1)
            ax.set_title(title, loc="left", fontsize=FONT, color=MUTED)

    return draw


def draw_curves(
    ax: Axes,
    curves: Sequence[Curve],
    percent: bool,
    zero: bool,
    top: float | None,
    height: float,
    ticks: int = 5,
    label: bool = True,
) -> None:
    rounds = sorted({x for curve in curves for x, _ in curve.points})
    for curve in reversed(curves):  # the first one is the most important: on top
        xs, ys = zip(*curve.points, strict=True)
        if curve.band:
            bx, low, high = zip(*curve.band, strict=True)
            ax.fill_between(bx, low, high, color=curve.color, alpha=0.14, linewidth=0)
        gaps = len(xs) == 1 or any(
            math.isnan(y) for y in ys
        )  # a lone point needs a mark to be seen
        dots = gaps or (len(rounds) <= 30 and not curve.dashed)
        ax.plot(
            xs,
            ys,
            color=curve.color,
            linewidth=1.8,
            linestyle=(0, (4, 2.5)) if curve.dashed else "-",
            marker="o" if dots else None,
            markersize=3.2,
            markeredgewidth=0,
            clip_on=False,
        )
    round_axis(ax, rounds, label=label)
    value_axis(ax, percent, zero, top, ticks)
    ends = [
        (next(y for _, y in reversed(curve.points) if not math.isnan(y)), curve.label, curve.color)
        for curve in curves
        if curve.label
    ]
    label_ends(ax, ends, height)


def heatmap(
    values: Sequence[Sequence[float]], rounds: Sequence[int], groups: Sequence[tuple[str, str, int]]
) -> Draw:
    """Rows x rounds as one small raster image, NaN blank; `groups`: (label, colour, rows) from the top."""
    tint = tuple(channel / 255 for channel in HEAT)
    cmap = LinearSegmentedColormap.from_list("heat", [(*tint, HEAT_ALPHA), (*tint, 1.0)])
    cmap = cmap.with_extremes(bad=(0, 0, 0, 0))

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        ax.grid(visible=False)
        extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(values), 0)
        peak = max((v for row in values for v in row if not math.isnan(v)), default=1.0)
        ax.imshow(
            values,
            cmap=cmap,
            vmin=0,
            vmax=peak or 1.0,
            aspect="auto",
            interpolation="none",
            extent=extent,
        )
        round_axis(ax, rounds, margin=0.5)
        ax.set_yticks([])
        ends, row = [], 0
        for text, ink, count in groups:
            if row:
                ax.axhline(row, color=GRID, linewidth=1)
            ends.append((row + count / 2, text, ink))
            row += count
        label_ends(ax, ends, figure.get_figheight() * 72 - 46)

    return draw


def spectrum(curves: Sequence[Curve], ranks: Sequence[tuple[int, str]]) -> Draw:
    """Singular values against their index, log-log; a vertical line and a tick at each deployed rank."""

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        last = max(x for curve in curves for x, _ in curve.points)
        for curve in curves:
            xs, ys = zip(*curve.points, strict=True)
            mark = "o" if len(xs) == 1 else None
            ax.plot(xs, ys, color=curve.color, linewidth=1.6, marker=mark, markersize=3.2)
        ax.set_xlim(1, max(last, 2.0))
        shown = [(rank, ink) for rank, ink in ranks if 1 < rank <= last]
        for rank, ink in shown:
            ax.axvline(rank, color=ink, linewidth=1.1, linestyle=(0, (2, 2)), zorder=0)
        ax.xaxis.set_major_locator(ApartLocator(ax, [1, *(rank for rank, _ in shown)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("component (dashed: deployed ranks)", color=MUTED, fontsize=FONT)
        ends = [(curve.points[-1][1], curve.label, curve.color) for curve in curves]
        label_ends(ax, ends, figure.get_figheight() * 72 - 46)

    return draw


def stacked(
    rounds: Sequence[int],
    parts: Sequence[tuple[Sequence[float], str]],
    show: Callable[[float], str],
) -> Draw:
    """Stacked columns, merged into one shape when there are many; `parts`: (values, colour)."""

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        gap, hole = (0.12, [math.nan]) if len(rounds) <= 40 else (0.0, [])
        edges = [x for r in rounds for x in (r - 0.5 + gap, r + 0.5 - gap, *hole)]
        base = [0.0] * len(rounds)
        for values, ink in parts:
            top = [b + v for b, v in zip(base, values, strict=True)]
            low, high = ([x for y in ys for x in (y, y, *hole)] for ys in (base, top))
            ax.fill_between(edges, low, high, color=ink, linewidth=0)
            base = top
        round_axis(ax, rounds, margin=0.6)
        value_axis(ax, False, True, None)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))

    return draw


@dataclass(frozen=True)
class Dots:
    """Values of one kind as dots, with their mean and the half-width of its interval, where known."""

    label: str
    values: Sequence[float]
    color: str
    mean: float | None = None
    half: float | None = None


def strips(rows: Sequence[Dots], *, percent: bool = False) -> Draw:
    """One row of dots for each kind, under its label: the mean as a tick, its interval as a bar."""

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        ax.grid(visible=False)
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        ends = []
        for y, row in enumerate(rows):
            if row.mean is not None:
                low, high = row.mean - (row.half or 0.0), row.mean + (row.half or 0.0)
                ax.plot([low, high], [y, y], color=row.color, linewidth=6, alpha=0.3)
                ax.plot([row.mean], [y], "|", color=row.color, markersize=13, markeredgewidth=2.2)
                ends += [low, high]
            at = [y] * len(row.values)
            ax.plot(row.values, at, "o", color=row.color, markersize=5, clip_on=False)
            ax.annotate(
                row.label,
                (0.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(0, 12),
                textcoords="offset points",
                va="center",
                color=INK,
                annotation_clip=False,
            )
        dots = [value for row in rows for value in row.values]
        low, high = min(dots), max(dots)
        room = (high - low) or 0.05 * abs(high) or 1.0
        # the interval of two values may be wider than all the dots: cut, so that these stay apart
        left = max(min([low - 0.05 * room, *ends]), low - room)
        right = min(max([high + 0.05 * room, *ends]), high + room)
        ax.set_xlim(*((max(left, 0.0), min(right, 1.0)) if percent else (left, right)))
        ax.set_ylim(len(rows) - 0.5, -0.8)
        ax.set_yticks([])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(number_ticks(percent))

    return draw


def scatter(groups: Sequence[Curve], x: str, *, percent: bool = False) -> Draw:
    """Each group's points as dots over an axis `x` from 0, and its label at the mean of them."""

    def draw(figure: Figure) -> None:
        ax = new_axes(figure)
        for group in groups:
            xs, ys = zip(*group.points, strict=True)
            middle = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
            # whole at the edge, too: who trains alone sends no bytes
            dots: dict[str, Any] = {"color": group.color, "markeredgewidth": 0, "clip_on": False}
            ax.plot(xs, ys, "o", markersize=4, alpha=0.5, **dots)
            ax.plot(*middle, "o", markersize=8, **dots)
            ax.annotate(
                group.label,
                middle,
                xytext=(6, 6),
                textcoords="offset points",
                color=group.color,
                fontweight="bold",
            )
        ax.set_xlim(0, 1.08 * max(x for group in groups for x, _ in group.points) or 1.0)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(number_ticks(False))
        ax.set_xlabel(x, color=MUTED, fontsize=FONT)
        ax.margins(y=0.15)
        value_axis(ax, percent, False, None)

    return draw


def number_ticks(percent: bool) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:.4g}%" if percent else f"{value:.6g}")
