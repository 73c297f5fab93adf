"""Each term of the bound of docs/maths.md, round by round, beside what it bounds.

    python experiments/theory/terms.py

Clients take K noisy steps in W, for which the bound is stated. Writes terms.json beside this file; a minute
on one thread.
"""

from __future__ import annotations

from typing import Any

import torch
from laboratory import Local, Problem, Round, cell, draw, interval, play, write

from fedhl import get_method, get_weighting
from fedhl.server import diagnostics

RANKS, SIDE, APART = (4, 4, 8, 16), 20, 1.0
ROUNDS = 200
LOCAL = Local(rate=0.05, steps=2, noise=1.0, full=True)
SEEDS = (0, 1, 2, 3)
CASES = {
    "fedhl, printed weights": ("fedhl", "truncation"),
    "flexlora": ("flexlora", "uniform"),
    "fedhl_ef": ("fedhl_ef", "uniform"),
}


def terms(problem: Problem, L: float, round: Round) -> dict[str, float]:
    """The terms of one round, with the constants of the standard argument; `gradient` is what is bounded."""
    W, p, q, eta, K = round.before, round.p, problem.q, LOCAL.rate, LOCAL.steps
    gradient = problem.gradient(W)
    gradients = problem.gradients(W)
    apart = (gradients - gradient).square().sum((1, 2))
    chi2 = diagnostics.summarise_weights(p, q, round.e)["chi2"]
    largest = float(gradients.square().sum((1, 2)).max())
    products = diagnostics.of_products(round.updates)
    before, after = round.before.float(), round.after.float()
    wrong = diagnostics.aggregation_error(before, after, round.updates, products)
    return {
        "gradient": float(gradient.square().sum()),
        "loss": float(problem.loss(W)),
        "noise": L * eta * LOCAL.noise**2 * float(p.square().sum()),
        "drift": L**2 * eta**2 * (K * LOCAL.noise**2 + K**2 * largest),
        "weights": 2 * float((q * apart).sum()) * chi2,
        "starts": 4 * L**2 * len(p) * float((p.square() * round.e).sum()),
        "aggregation": wrong / (eta * K) ** 2,
    }


def run(case: str, seed: int) -> dict[str, list[float]]:
    method, weighting = CASES[case]
    problem = draw(seed, APART, SIDE, len(RANKS))
    L, least = problem.smoothness(), float(problem.loss(problem.optimum()))
    played = play(problem, get_method(method), get_weighting(weighting), LOCAL, ROUNDS, seed, RANKS)
    rows = [terms(problem, L, round) for round in played]
    first = 2 * (rows[0]["loss"] - least) / (LOCAL.rate * LOCAL.steps)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["loss"] = [loss - least for loss in columns["loss"]]
    return columns | {"first": [first]}


def row(case: str) -> dict[str, Any]:
    """Means over seeds, by round and on average over all rounds; `first` is `2 (F_0 - F*) / (η K T)`."""
    found = [cell(__file__, {"case": case, "seed": s}, lambda s=s: run(case, s)) for s in SEEDS]
    parts = [name for name in found[0] if name != "first"]
    averages = {name: [sum(of[name]) / ROUNDS for of in found] for name in parts}
    averages["first"] = [of["first"][0] / ROUNDS for of in found]
    bound = [
        sum(averages[name][k] for name in averages if name not in ("gradient", "loss"))
        for k in range(len(SEEDS))
    ]
    ratio = [b / g for b, g in zip(bound, averages["gradient"], strict=True)]
    by_round = {
        name: [sum(of[name][t] for of in found) / len(SEEDS) for t in range(ROUNDS)]
        for name in parts
    }
    return {
        "case": case,
        "average": {name: interval(values) for name, values in averages.items()},
        "bound over gradient": interval(ratio),
        "last": {name: interval([of[name][-1] for of in found]) for name in parts},
        "by round": by_round,
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [row(case) for case in CASES]
    about = {"seeds": SEEDS, "ranks": RANKS, "side": SIDE, "apart": APART, "rounds": ROUNDS}
    about |= {"rate": LOCAL.rate, "steps": LOCAL.steps, "noise": LOCAL.noise}
    write(__file__, about | {"rows": rows})


if __name__ == "__main__":
    main()
