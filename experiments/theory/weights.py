"""FedHL with its printed weights, uniform weights and data shares: effective clients and the final error.

    python experiments/theory/weights.py

Clients have unequal numbers of rows, and F weights them by these. Writes weights.json beside this file; some
minutes on one thread, resumable (runs/theory/).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from laboratory import RANKS, SIDE, Local, Problem, cell, draw, interval, play, write

from fedhl import get_method, get_weighting
from fedhl.seeds import generator
from fedhl.subspace import energy

ROUNDS = 60
RATES = (0.05, 0.15)
SEEDS = (0, 1, 2, 3, 4, 5, 6)
OWN = 8
"""Inputs that clients of the lowest rank alone have."""
WEIGHTS: dict[str, dict[str, Any]] = {
    "printed, power 2": {"name": "truncation", "power": 2.0},
    "printed, power 2, ε = 1e-4": {"name": "truncation", "power": 2.0, "epsilon": 1e-4},
    "power 1": {"name": "truncation", "power": 1.0},
    "uniform": {"name": "uniform"},
    "data shares": {"name": "examples"},
}
"""The paper's ε is not known to us: ours is 0.05, and a small one shows what the rule does by itself."""
DATA = {"alike": 0.0, "unlike": 1.0, "own inputs": 0.0}


def problem_of(data: str, seed: int) -> Problem:
    """Clients with rows between 1 and 10 units. `own inputs`: the last inputs are zero for all clients but
    those of the lowest rank."""
    sizes = 10 ** torch.rand(len(RANKS), generator=generator(seed, "sizes"), dtype=torch.float64)
    problem = draw(seed, DATA[data], q=sizes / sizes.sum())
    if data != "own inputs":
        return problem
    keep = torch.ones(len(RANKS), SIDE, dtype=torch.float64)
    keep[[r > min(RANKS) for r in RANKS], -OWN:] = 0
    return replace(problem, H=problem.H * keep[:, :, None] * keep[:, None, :])


def run(data: str, weights: str, rate: float, seed: int) -> dict[str, float] | None:
    """The end, with distances relative to `||W*||`, also within the inputs that few have and the others."""
    problem = problem_of(data, seed)
    optimum = problem.optimum()
    method, weighting = get_method("fedhl"), get_weighting(**WEIGHTS[weights])
    last, effective = None, []
    for last in play(problem, method, weighting, Local(rate), ROUNDS, seed):
        effective.append(1 / float(last.p.square().sum()))
    if last is None or len(effective) < ROUNDS:
        return None
    far = last.after - optimum
    excess = problem.loss(last.after) - problem.loss(optimum)
    return {
        "distance": (energy(far) / energy(optimum)) ** 0.5,
        "few": (energy(far[:, -OWN:]) / energy(optimum[:, -OWN:])) ** 0.5,
        "excess loss": float(excess / (problem.loss(0 * optimum) - problem.loss(optimum))),
        "effective clients": effective[-1],
        "effective clients, mean": sum(effective) / ROUNDS,
        "low ranks' weight": float(last.p[[r == min(RANKS) for r in RANKS]].sum()),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for data in DATA:
        for weights in WEIGHTS:

            def at(rate: float, seed: int, data: str = data, weights: str = weights) -> Any:
                key = {"data": data, "weights": weights, "rate": rate, "seed": seed}
                return cell(__file__, key, lambda: run(data, weights, rate, seed))

            grid = {rate: at(rate, SEEDS[0]) for rate in RATES}
            rate = min((r for r in RATES if grid[r]), key=lambda r: grid[r]["excess loss"])
            ends = [at(rate, seed) for seed in SEEDS[1:]]
            row = {part: interval([end[part] for end in ends]) for part in ends[0]}
            rows.append({"data": data, "weights": weights, "rate": rate, **row})
    about = {"seeds": SEEDS[1:], "seed of the rates": SEEDS[0], "rates": RATES, "rounds": ROUNDS}
    write(__file__, about | {"ranks": RANKS, "own inputs": OWN, "rows": rows})


if __name__ == "__main__":
    main()
