"""How near the global optimum each method ends, with LoRA steps, and what it lacks there.

    python experiments/theory/optimum.py

Each method takes, of one grid, the rate with which it ends nearest on seed 0; the other seeds are the result.
Writes optimum.json beside this file; about a quarter of an hour on one thread, resumable (runs/theory/).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from laboratory import (
    RANKS,
    Local,
    Problem,
    Round,
    cell,
    draw,
    interval,
    play,
    rank_stabilised,
    unseen,
    write,
)
from torch import Tensor

from fedhl import get_method, get_weighting
from fedhl.lora import truncate
from fedhl.server import diagnostics

ROUNDS, EVERY = 150, 5
RATES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
SEEDS = (1, 2, 3)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "fedhl, printed weights": ("fedhl", {}, "truncation"),
    "fedhl": ("fedhl", {}, "uniform"),
    "flexlora": ("flexlora", {}, "uniform"),
    "hetlora": ("hetlora", {"gamma": 1.0}, "uniform"),
    "flora": ("flora", {}, "uniform"),
    "fedhl_ef, start D": ("fedhl_ef", {}, "uniform"),
    "fedhl_ef, random start": ("fedhl_ef", {"begin": "random"}, "uniform"),
}
"""Name -> method, its settings, weighting. `gamma: 1` is HetLoRA without pruning; its penalty is left out."""
SETTINGS = {
    "alike, s = 1": (0.0, [1.0] * len(RANKS)),
    "unlike, s = 1": (1.0, [1.0] * len(RANKS)),
    "unlike, s ~ 1/sqrt(r)": (1.0, rank_stabilised()),
}
"""Name -> how far apart the clients' optima are, their scales."""


def end(problem: Problem, optimum: Tensor, scales: list[float], last: Round) -> dict[str, Any]:
    """Where a federation ended, and what could have moved it on. Distances are relative to `||W*||`."""
    W, whole = last.after, float(optimum.norm())
    G = problem.gradient(last.before)
    products = diagnostics.of_products(last.updates)
    error = diagnostics.aggregation_error(
        last.before.float(), last.after.float(), last.updates, products
    )
    tilt = torch.tensor([r * s**2 for r, s in zip(RANKS, scales, strict=True)]).double()
    tilted = replace(problem, q=tilt / tilt.sum()).optimum()
    return {
        "distance": float((W - optimum).norm()) / whole,
        "truncated": float((truncate(W, max(RANKS)).delta() - optimum).norm()) / whole,
        "gradient": float(G.norm()),
        "unseen": unseen(G, last.updates),
        "start": float((last.p * last.e).sum().clamp(min=0).sqrt()) / whole,
        "aggregation": error**0.5 / whole,
        "moved": float((last.after - last.before).norm()) / whole,
        "to tilted": float((W - tilted).norm()) / whole,
        "tilted": float((tilted - optimum).norm()) / whole,
        "effective clients": float(1 / last.p.square().sum()),
    }


def run(setting: str, name: str, rate: float, seed: int) -> dict[str, Any]:
    """The distance to the optimum, every few rounds, and the end; no end if W did not stay finite."""
    apart, scales = SETTINGS[setting]
    method, settings, weighting = METHODS[name]
    problem = draw(seed, apart)
    optimum = problem.optimum()
    whole = float(optimum.norm())
    rounds = play(
        problem,
        get_method(method, **settings),
        get_weighting(weighting),
        Local(rate),
        ROUNDS,
        seed,
        scales=scales,
    )
    distances, last, done = [1.0], None, 0
    for done, last in enumerate(rounds, start=1):
        if done % EVERY == 0:
            distances.append(float((last.after - optimum).norm()) / whole)
    if done < ROUNDS or last is None or not math.isfinite(distances[-1]) or distances[-1] > 10:
        return {"distances": None, "end": None}
    return {"distances": distances, "end": end(problem, optimum, scales, last)}


def variant(setting: str, name: str) -> dict[str, Any]:
    """A method in a setting: its rate, chosen on seed 0, and the other seeds."""

    def one(rate: float, seed: int) -> dict[str, Any]:
        key = {"setting": setting, "method": name, "rate": rate, "seed": seed}
        return cell(__file__, key, lambda: run(setting, name, rate, seed))

    grid = {rate: one(rate, 0) for rate in RATES}
    ends = {rate: x["end"]["distance"] for rate, x in grid.items() if x["end"]}
    rate = min(ends, key=lambda rate: ends[rate])
    runs = [one(rate, seed) for seed in SEEDS]
    kept = [x for x in runs if x["end"]]
    return {
        "setting": setting,
        "method": name,
        "rate": rate,
        "grid": {str(rate): ends.get(rate) for rate in RATES},
        "diverged": len(runs) - len(kept),
        "distances": [
            interval([x["distances"][k] for x in kept]) | {"values": None}
            for k in range(len(kept[0]["distances"]))
        ],
        "end": {part: interval([x["end"][part] for x in kept]) for part in kept[0]["end"]},
    }


def main() -> None:
    torch.set_num_threads(1)
    result = [variant(setting, name) for setting in SETTINGS for name in METHODS]
    about = {"seeds": SEEDS, "seed of the rates": 0, "rates": RATES, "rounds": ROUNDS}
    write(__file__, about | {"every": EVERY, "ranks": RANKS, "variants": result})


if __name__ == "__main__":
    main()
