"""Another learning rate for B than for A (LoRA+), on a grid of ratios: does it change which method wins?

    python experiments/theory/lora_plus.py

For each ratio a method takes the rate with which it ends nearest the optimum on seed 0. Writes lora_plus.json
beside this file; some minutes on one thread, resumable (runs/theory/).
"""

from __future__ import annotations

from typing import Any

import torch
from laboratory import Local, cell, draw, interval, play, write

from fedhl import get_method, get_weighting

RANKS, SIDE = (4, 4, 4, 8, 16, 32), 40
ROUNDS = 60
RATES = (0.05, 0.15, 0.45)
RATIOS = (0.25, 1.0, 4.0, 16.0)
SEEDS = (0, 1, 2, 3)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedhl": ("fedhl", {}),
    "flexlora": ("flexlora", {}),
    "hetlora": ("hetlora", {"gamma": 1.0}),
    "flora": ("flora", {}),
    "fedhl_ef, start D": ("fedhl_ef", {}),
    "fedhl_ef, random start": ("fedhl_ef", {"begin": "random"}),
}
APART = {"alike": 0.0, "unlike": 1.0}


def run(name: str, clients: str, ratio: float, rate: float, seed: int) -> float | None:
    """The distance to the optimum at the end, relative to its norm; None if the run diverged."""
    problem = draw(seed, APART[clients], SIDE, len(RANKS))
    method, settings = METHODS[name]
    played = play(
        problem,
        get_method(method, **settings),
        get_weighting("uniform"),
        Local(rate, ratio),
        ROUNDS,
        seed,
        RANKS,
    )
    rounds = list(played)
    if len(rounds) < ROUNDS:
        return None
    optimum = problem.optimum()
    far = float((rounds[-1].after - optimum).norm() / optimum.norm())
    return far if far < 10 else None


def row(name: str, clients: str, ratio: float) -> dict[str, Any]:
    def at(rate: float, seed: int) -> float | None:
        key = {"method": name, "clients": clients, "ratio": ratio, "rate": rate, "seed": seed}
        return cell(__file__, key, lambda: run(name, clients, ratio, rate, seed))

    grid = {rate: far for rate in RATES if (far := at(rate, SEEDS[0])) is not None}
    if not grid:
        return {"method": name, "clients": clients, "ratio": ratio, "rate": None, "distance": None}
    rate = min(grid, key=lambda rate: grid[rate])
    ends = [at(rate, seed) for seed in SEEDS[1:]]
    kept = [end for end in ends if end is not None]
    return {
        "method": name,
        "clients": clients,
        "ratio": ratio,
        "rate": rate,
        "diverged": len(ends) - len(kept),
        "distance": interval(kept),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [row(name, clients, ratio) for clients in APART for name in METHODS for ratio in RATIOS]
    about = {"seeds": SEEDS[1:], "seed of the rates": SEEDS[0], "rates": RATES, "ratios": RATIOS}
    write(__file__, about | {"ranks": RANKS, "side": SIDE, "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
