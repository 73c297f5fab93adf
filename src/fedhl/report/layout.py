"""Where the axes of a plot lie: as large as the texts around them permit.

Matplotlib's own layouts look for texts everywhere, which takes longer than all the rest of a plot. Here they
have known places: ticks left of the axes and below them, labels right of them, a title above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties
from matplotlib.text import Annotation
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Locator

FONT = 11.5  # of tick labels and direct labels, in CSS pixels at the drawn size
LINE = 16  # of text, with the space above it
GAP = 5  # between axes and texts
EDGE = 3  # around everything


def arrange(stack: Sequence[Axes], width: float, height: float) -> None:
    """Put axes one below the other in a figure of this size; all have the width of the narrowest."""
    ticks = [text_width(text) / 2 for ax in stack for text in tick_texts(ax.xaxis)]
    before = [GAP + text_width(text) for ax in stack for text in tick_texts(ax.yaxis)]
    after = [GAP + text_width(text) for ax in stack for text in end_texts(ax)]
    left, right = EDGE + max(ticks + before), EDGE + max(ticks + after)
    above = [EDGE + GAP + LINE * bool(ax.get_title(loc="left")) for ax in stack]
    below = [EDGE + LINE * lines_below(ax) for ax in stack]
    each = (height - math.fsum(above + below)) / len(stack)
    top = float(height)
    for ax, over, under in zip(stack, above, below, strict=True):
        bottom = top - over - each
        box = (left / width, bottom / height, (width - left - right) / width, each / height)
        ax.set_position(box)
        top = bottom - under


@cache  # the plots of a page have most of their texts in common, and each is drawn at two widths
def text_width(text: str) -> float:
    font = FontProperties(size=FONT)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def tick_texts(axis: Axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    shown = [at for at in axis.get_majorticklocs() if low <= at <= high]
    return axis.get_major_formatter().format_ticks(shown)


def end_texts(ax: Axes) -> list[str]:
    """The labels that begin at the right edge of the axes."""
    labels = [text for text in ax.texts if isinstance(text, Annotation)]
    return [label.get_text() for label in labels if label.xycoords == "axes fraction"]


def lines_below(ax: Axes) -> int:
    return bool(ax.xaxis.get_tick_params()["labelbottom"]) + bool(ax.get_xlabel())


class ApartLocator(Locator):
    """Ticks at given places on the x axis, but none that would touch the one before."""

    def __init__(self, ax: Axes, places: Sequence[float]) -> None:
        self.ax, self.places = ax, places

    def __call__(self) -> list[float]:
        shown, end = [], -math.inf
        for place in self.places:
            pixel = self.ax.transData.transform((place, 1.0))[0]
            if pixel > end:
                shown.append(place)
                end = pixel + 2 * FONT
        return shown
