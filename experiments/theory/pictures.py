"""The pictures of docs/theory.md, from the result files beside this program.

python experiments/theory/pictures.py
"""

from __future__ import annotations

from typing import Any

import matplotlib
from laboratory import DOCS, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "fedhl": "#555555",
    "fedhl, printed weights": "#a0a0a0",
    "flexlora": "#c2571a",
    "hetlora": "#7a4fa3",
    "flora": "#3b7d4f",
    "fedhl_ef, start D": "#d09a1e",
    "fedhl_ef, random start": "#1f5fa8",
}


def line(axes: Axes, x: Any, points: list[dict[str, Any]], colour: str, **style: Any) -> None:
    """The means over seeds, with the 95% interval as a band, as far as it is positive."""
    mean = [p["mean"] for p in points]
    half = [p["half"] or 0.0 for p in points]
    axes.plot(x, mean, color=colour, linewidth=1.4, **style)
    low = [max(m - h, m / 10) for m, h in zip(mean, half, strict=True)]
    high = [m + h for m, h in zip(mean, half, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def finish(figure: Figure, axes: Any, name: str) -> None:
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"theory-{name}.svg", metadata={"Date": None})
    plt.close(figure)


def optimum() -> None:
    result = read("optimum")
    settings = list(dict.fromkeys(v["setting"] for v in result["variants"]))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    for one, setting in zip(axes, settings, strict=True):
        for v in result["variants"]:
            if v["setting"] == setting:
                t = [result["every"] * k for k in range(len(v["distances"]))]
                style = "--" if v["method"] == "fedhl_ef, random start" else "-"  # it lies on flora
                colour, label = COLOURS[v["method"]], v["method"]
                line(one, t, v["distances"], colour, linestyle=style, label=label)
        title = setting.replace("s ~ 1/sqrt(r)", r"$s \propto 1/\sqrt{r}$")
        one.set(yscale="log", ylim=(1e-4, 1.3), xlabel="rounds")
        one.set_title(title, fontsize=9)
    axes[0].set_ylabel(r"$\|W - W^*\| \,/\, \|W^*\|$")
    axes[2].legend(frameon=False, fontsize=7, loc="lower left")
    finish(figure, axes, "optimum")


CASES = {
    "fedhl, steps in W": ("#555555", "-", "fedhl"),
    "flexlora, steps in W": ("#c2571a", "-", "flexlora"),
    "fedhl_ef, steps in W": ("#1f5fa8", "-", "fedhl_ef"),
    "fedhl, LoRA": ("#555555", "-", "fedhl"),
    "flexlora, LoRA": ("#c2571a", "-", "flexlora"),
    "fedhl_ef, LoRA from D": ("#d09a1e", "-", "fedhl_ef, start D"),
    "fedhl_ef, LoRA from random, s = 1": ("#63a0dc", "--", "fedhl_ef, random start, one s"),
    "fedhl_ef, LoRA from random": (
        "#1f5fa8",
        "-",
        r"fedhl_ef, random start, $s \propto 1/\sqrt{r}$",
    ),
}
"""Case -> colour, style, label."""


def rate() -> None:
    result = read("rate")
    T = result["horizons"]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), layout="constrained", sharey=True)
    kinds = [
        (clients, local) for local in ("steps in W", "LoRA") for clients in ("alike", "unlike")
    ]
    for one, (clients, local) in zip(axes, kinds, strict=True):
        for r in result["rows"]:
            if r["clients"] == clients and local in r["case"]:
                colour, style, label = CASES[r["case"]]
                line(one, T, r["gradient"], colour, linestyle=style, marker=".", label=label)
        one.plot(T, [0.25 * (T[0] / t) ** 0.5 for t in T], "k:", linewidth=1, label=r"$T^{-1/2}$")
        one.set(xscale="log", yscale="log", xlabel="T")
        one.set_xticks(T, [f"{t:,}" for t in T], minor=False)
        one.set_xticks([], minor=True)
        one.set_title(f"{local}, clients {clients}", fontsize=9)
        one.legend(frameon=False, fontsize=7, loc="lower left", handlelength=3)
    axes[0].set_ylabel(r"mean over t < T of $\|\nabla F(W_t)\|^2$")
    finish(figure, axes, "rate")


TERMS = {
    "gradient": ("#000000", r"$\|\nabla F\|^2$, which is bounded"),
    "loss": ("#999999", "excess loss"),
    "starts": ("#1f5fa8", r"starts, $4 L^2 m \sum p_i^2 e_i$"),
    "aggregation": ("#c2571a", r"aggregation, $\|e_t\|^2 / (\eta K)^2$"),
    "weights": ("#7a4fa3", r"weights, $2 \zeta^2 \chi^2$"),
    "drift": ("#d09a1e", "drift of the local steps"),
    "noise": ("#3b7d4f", "noise of the gradients"),
}


def terms() -> None:
    result = read("terms")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    for one, r in zip(axes, result["rows"], strict=True):
        for name, (colour, label) in TERMS.items():
            values = r["by round"][name]
            if max(values) > 1e-6:
                width = 2.0 if name in ("gradient", "loss") else 1.2
                one.plot(range(len(values)), values, color=colour, linewidth=width, label=label)
        one.set(yscale="log", ylim=(1e-3, 30), xlabel="round")
        one.set_title(r["case"], fontsize=9)
    handles: dict[str, Any] = {}
    for one in axes:
        handles |= dict(zip(*reversed(one.get_legend_handles_labels()), strict=True))
    axes[2].legend(handles.values(), handles.keys(), frameon=False, fontsize=7, loc="upper right")
    finish(figure, axes, "terms")


def sums() -> None:
    result = read("sums")
    ranks = list(dict.fromkeys(r["rank"] for r in result["rows"]))
    epochs = list(dict.fromkeys(r["epochs"] for r in result["rows"]))
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    shades = dict(zip(ranks, ("#9ecae1", "#4292c6", "#08306b"), strict=True))
    places = [(data, e) for data in ("alike", "one class each") for e in epochs]
    for one, (data, e) in zip(axes, places, strict=True):
        for r in result["rows"]:
            if (r["data"], r["epochs"]) == (data, e):
                for name, style in (("sum of products", "-"), ("product of sums", "--")):
                    t = range(1, 1 + len(r[name]["curve"]))
                    label = f"{name}, r = {r['rank']}"
                    one.plot(t, r[name]["curve"], style, color=shades[r["rank"]], label=label)
        one.set(ylim=(0, 1), xlabel="round")
        one.set_title(f"{data}, local epochs: {e}", fontsize=9)
    axes[0].set_ylabel("accuracy of the pair that is broadcast")
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    finish(figure, axes, "sums")


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "theory"
    for draw in (optimum, rate, terms, sums):
        draw()


if __name__ == "__main__":
    main()
