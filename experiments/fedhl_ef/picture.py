"""Accuracy against bytes on CLINC150, from the committed results beside this file.

    python experiments/fedhl_ef/picture.py

Writes docs/bytes.svg: each method's mean over seeds with its 95% interval, and each seed, against the bytes
that all clients were sent in the whole run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from fedhl.report.statistics import mean_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent.parent / "docs" / "bytes.svg"
RANDOM = "fedhl_ef@method.begin=random"
WIDE = "@method.download=4@wire.download=int8"


class Point(NamedTuple):
    """A variant of some result files, which have seeds of their own; and how it is shown."""

    files: tuple[str, ...]
    variant: str
    label: str
    colour: str
    below: bool = False


POINTS = (
    Point(("clinc150",), "fedhl", "fedhl", "#555555"),
    Point(("clinc150",), "fedhl_ef", "fedhl_ef, starts at D", "#c2571a", below=True),
    Point(
        ("clinc150",),
        "fedhl_ef" + WIDE,
        "fedhl_ef, starts at D, download of rank 4r in int8",
        "#c2571a",
    ),
    Point(
        ("clinc150_random", "clinc150_random_more"),
        RANDOM,
        "fedhl_ef, random start",
        "#1f5fa8",
        below=True,
    ),
    Point(
        ("clinc150_random", "clinc150_random_more"),
        RANDOM + WIDE,
        "fedhl_ef, random start, download of rank 4r in int8",
        "#1f5fa8",
    ),
    Point(("clinc150",), "fed_plora", "fed_plora", "#7a4fa3"),
    Point(("clinc150_starts",), "flora", "flora", "#3b7d4f"),
)


def runs(point: Point) -> list[dict[str, Any]]:
    """The runs of a point, one for each seed."""
    found = []
    for name in point.files:
        study = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        (variant,) = (v for v in study["variants"] if v["variant"] == point.variant)
        found += variant["runs"]
    assert len({run["seed"] for run in found}) == len(found)
    return found


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "bytes"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for point in POINTS:
        those = runs(point)
        down = [run["bytes"]["down"] / 2**20 for run in those]
        scores = [run["final"]["full"]["accuracy"] for run in those]
        mean, half = mean_interval(scores)
        x = sum(down) / len(down)
        axes.plot(down, scores, ".", color=point.colour, alpha=0.35, markersize=4)
        axes.errorbar(x, mean, yerr=half, fmt="o", color=point.colour, capsize=3)  # pyright: ignore
        axes.annotate(
            point.label,
            (x, mean or 0.0),
            xytext=(9, -9 if point.below else 3),
            textcoords="offset points",
            fontsize=8,
            color=point.colour,
        )
    axes.set(
        xscale="log",
        xlim=(100, 2500),
        ylim=(0.2, 0.9),
        xlabel="MiB to the clients, whole run",
        ylabel="accuracy of the full W",
    )
    axes.set_xticks([100, 200, 400, 800, 1600], ["100", "200", "400", "800", "1,600"])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
