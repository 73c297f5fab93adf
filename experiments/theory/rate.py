"""The average squared gradient of F against the number of rounds T, at the step size of the theorems.

    python experiments/theory/rate.py

`η = c / √(K T)`: each T is a run of its own. Clients take K noisy steps in W, as the proofs idealise them,
or LoRA steps. Writes rate.json beside this file; a quarter of an hour on one thread, resumable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from laboratory import Local, cell, draw, interval, play, write

from fedhl import get_method, get_weighting

RANKS = (4, 4, 8, 16)
SIDE, STEPS, NOISE, C = 20, 2, 1.0, 0.85
HORIZONS = (16, 64, 256, 1024)
SEEDS = (0, 1, 2)
UNTILTED = [(3 * SIDE / r) ** 0.5 for r in RANKS]
"""Scales at which the mean step of a random start is `-η G` for every rank: `s² AᵀA` is `s² r / (3 n) I` on
average."""
ONE = [1.0] * len(RANKS)
CASES: dict[str, tuple[str, dict[str, Any], bool, list[float]]] = {
    "fedhl, steps in W": ("fedhl", {}, True, ONE),
    "flexlora, steps in W": ("flexlora", {}, True, ONE),
    "fedhl_ef, steps in W": ("fedhl_ef", {}, True, ONE),
    "fedhl, LoRA": ("fedhl", {}, False, ONE),
    "flexlora, LoRA": ("flexlora", {}, False, ONE),
    "fedhl_ef, LoRA from D": ("fedhl_ef", {}, False, ONE),
    "fedhl_ef, LoRA from random, s = 1": (
        "fedhl_ef",
        {"begin": "random"},
        False,
        [UNTILTED[-1]] * len(RANKS),
    ),
    "fedhl_ef, LoRA from random": ("fedhl_ef", {"begin": "random"}, False, UNTILTED),
}
"""Name -> method, its settings, whether steps are in W, scales."""
APART = {"alike": 0.0, "unlike": 1.0}


def run(case: str, clients: str, T: int, seed: int) -> dict[str, float]:
    """`avg_{t<T} ||∇F(W_t)||²`, and the mean squared distances of the clients' starts from W."""
    method, settings, full, scales = CASES[case]
    problem = draw(seed, APART[clients], SIDE, len(RANKS))
    local = Local(C / (STEPS * T) ** 0.5, steps=STEPS, noise=NOISE, full=full)
    rounds = play(
        problem,
        get_method(method, **settings),
        get_weighting("uniform"),
        local,
        T,
        seed,
        RANKS,
        scales,
    )
    squares, starts = [], []
    for round in rounds:
        squares.append(float(problem.gradient(round.before).square().sum()))
        starts.append(float((round.p * round.e).sum()))
    assert len(squares) == T, "the run diverged"
    return {"gradient": sum(squares) / T, "start": sum(starts) / T}


def slope(values: Sequence[float], horizons: Sequence[int] = HORIZONS) -> float:
    """The slope of a line through log value against log T, by least squares."""
    x = [math.log(T) for T in horizons]
    y = [math.log(value) for value in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    below = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / below


def row(case: str, clients: str) -> dict[str, Any]:
    found = [
        [
            cell(
                __file__,
                {"case": case, "clients": clients, "T": T, "seed": seed},
                lambda T=T, seed=seed: run(case, clients, T, seed),
            )
            for T in HORIZONS
        ]
        for seed in SEEDS
    ]
    gradients = [[x["gradient"] for x in of_seed] for of_seed in found]
    return {
        "case": case,
        "clients": clients,
        "gradient": [interval(list(column)) for column in zip(*gradients, strict=True)],
        "start": [interval([of[k]["start"] for of in found]) for k in range(len(HORIZONS))],
        "slope": interval([slope(of_seed) for of_seed in gradients]),
        "last slope": interval([slope(of_seed[-2:], HORIZONS[-2:]) for of_seed in gradients]),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [row(case, clients) for case in CASES for clients in APART]
    about = {"seeds": SEEDS, "ranks": RANKS, "side": SIDE, "steps": STEPS, "noise": NOISE, "c": C}
    write(__file__, about | {"horizons": HORIZONS, "rows": rows})


if __name__ == "__main__":
    main()
