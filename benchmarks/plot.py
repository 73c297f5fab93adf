"""Draw docs/performance.png from benchmarks/results/server.json.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    growth = json.loads((HERE / "results/server.json").read_text("utf-8"))["growth"]["rows"]
    by_clients = [row for row in growth if row["series"] == "clients"]
    by_side = [row for row in growth if row["series"] == "side"]
    by_side += [row for row in by_clients if row["clients"] == by_side[0]["clients"]]
    flat = [row for row in growth if "and one of" in row["series"]]
    top = by_clients[0]["side"]

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = [
        (by_clients, "total rank", f"total rank of the cohort ({top} x {top})"),
        (by_side, "side", f"side of the layer ({by_side[0]['clients']} clients)"),
    ]
    for axis, (rows, x, label) in zip(axes[:2], panels, strict=True):
        for work, colour in (("step, s", "#1f5fa8"), ("truncation, s", "#c2571a")):
            axis.plot(
                [row[x] for row in rows],
                [row[work] for row in rows],
                marker="o",
                color=colour,
                label=work.removesuffix(", s"),
            )
        axis.set(xlabel=label, xlim=(0, 1.2 * max(row[x] for row in rows)))
        axis.set_ylim(0, 1.1 * max(row["step, s"] for row in rows))
        axis.grid(alpha=0.3)
    for row in by_clients:
        axes[0].annotate(
            f"{row['clients']}" + (" clients" if row is by_clients[-1] else ""),
            (row["total rank"], row["step, s"]),
            textcoords="offset points",
            # the first two are neighbours
            xytext={10: (0, 7), 30: (6, -10)}.get(row["clients"], (-5, 6)),
            ha={10: "center", 30: "left"}.get(row["clients"], "right"),
            fontsize=8,
        )
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, loc="upper center", fontsize=8)

    names = [row["series"].split(",")[0].replace(" of rank ", "\nof rank ") for row in flat]
    axes[2].bar(names, [row["step, s"] for row in flat], color="#1f5fa8", label="step")
    axes[2].bar(names, [row["truncation, s"] for row in flat], color="#c2571a", label="truncation")
    axes[2].set_xlabel(f"one total rank, {flat[0]['total rank']}")
    axes[2].grid(alpha=0.3, axis="y")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs/performance.png", dpi=130)


if __name__ == "__main__":
    main()
