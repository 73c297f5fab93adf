"""The metric of a run over its rounds, as a figure for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedhl.report.files import dig

MODELS = {
    "full W": ("full",),
    "cut to the top rank": ("truncated",),
    "clients, mean": ("clients", "mean"),
    "clients, worst": ("clients", "worst"),
}
"""The models of an evaluation, and where the evaluation has them."""


def curves(metrics: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """The metric `name` of each model over the rounds that were evaluated, from the lines of a run."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.add_subplot(xlabel="round", ylabel=name)
    for label, path in MODELS.items():
        points = []
        for line in metrics:
            if found := dig(line, "evaluation", *path):
                points.append((line["round"], found[name]))
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(frameon=False)
    return figure
