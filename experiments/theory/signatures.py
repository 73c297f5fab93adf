"""Three ways in which a federation fails, provoked, the logged quantities that show each, and what a run
makes of them.

    python experiments/theory/signatures.py

Writes signatures.json beside this file; a minute on one thread.
"""

from __future__ import annotations

from typing import Any

import torch
from laboratory import Local, Problem, Round, cell, draw, interval, play, write

from fedhl import get_method, get_weighting
from fedhl.run import signatures
from fedhl.server import diagnostics
from fedhl.subspace import energy

RANKS, SIDE, APART = (4, 4, 4, 4, 8, 32), 40, 0.5
ROUNDS, EVERY = 120, 10
SEEDS = (0, 1, 2)
HEALTHY = ("fedhl_ef", {"name": "uniform"}, Local(0.1))
CASES: dict[str, tuple[str, dict[str, Any], Local]] = {
    "healthy": HEALTHY,
    "collapse of the spectrum": ("flexlora", {"name": "uniform"}, Local(0.02)),
    "collapse of the weights": ("fedhl", {"name": "truncation", "epsilon": 1e-6}, Local(0.1)),
    "explosion of W": ("fedhl", {"name": "uniform"}, Local(0.1, steps=2, full=True)),
    "stagnation": ("fedhl", {"name": "uniform"}, Local(0.1)),
    "stagnation, noisy gradients": ("fedhl", {"name": "uniform"}, Local(0.1, noise=1.0)),
}
"""Name -> method, weighting, local steps."""


def run(case: str, seed: int) -> list[dict[str, float]]:
    """Every few rounds: what a server logs, and, of what it cannot know, the excess loss and the gradient."""
    method, weighting, local = CASES[case]
    problem = draw(seed, APART, SIDE, len(RANKS))
    optimum = problem.optimum()
    first, least = float(problem.loss(0 * optimum)), float(problem.loss(optimum))
    rows, lines, named = [], [], {}
    rounds = play(
        problem, get_method(method), get_weighting(**weighting), local, ROUNDS, seed, RANKS
    )
    for t, round in enumerate(rounds, start=1):
        line = logged(t, round, problem, local)
        line["signatures"] = signatures.first_seen(lines, line, ROUNDS)
        lines.append(line)
        named |= {f"{name} named": t for name in line["signatures"]}
        if t % EVERY:
            continue
        known = diagnostics.spectrum(round.after)
        drift = sum(diagnostics.moved(u) for u in round.updates) / len(RANKS)
        rows.append(
            {
                "round": t,
                "excess loss": (float(problem.loss(round.after)) - least) / (first - least),
                "gradient": float(problem.gradient(round.after).norm()),
                "norm over optimum's": (known.energy / energy(optimum)) ** 0.5,
                "effective rank": known.effective_rank,
                "tail share": known.tail_share(min(RANKS)),
                "tail share beyond the top rank": known.tail_share(max(RANKS)),
                "error of rank 4": float(round.e[0].clamp(min=0))
                / max(energy(round.before), 1e-30),
                "drift": drift**0.5,
                "moved": float((round.after - round.before).norm()),
                "effective clients": float(1 / round.p.square().sum()),
                "agreement": signatures.agreement(line),
                "cut": line["diagnostics"]["aggregation_error"] / line["diagnostics"]["step"],
                "starts lack": signatures.lacking(line),
            }
        )
    rows[-1] |= named
    return rows


def logged(t: int, round: Round, problem: Problem, local: Local) -> dict[str, Any]:
    """The line of a round, as far as `fedhl.run.signatures` reads it; the loss of clients is F before it."""
    before, after = round.before, round.after
    shares = round.e.clamp(min=0) / max(energy(before), 1e-30)
    products = diagnostics.of_products(round.updates)
    lost = diagnostics.aggregation_error(before, after, round.updates, products)
    loss = float(problem.loss(before))
    return {
        "round": t,
        "learning_rate": local.rate,
        "clients": [
            {"id": i, "rank": rank, "examples": 1, "weight": p, "error": e, "loss": loss}
            | {"drift": diagnostics.moved(update) ** 0.5}
            for i, (rank, p, e, update) in enumerate(
                zip(RANKS, round.p.tolist(), shares.tolist(), round.updates, strict=True)
            )
        ],
        "refused": [],
        "diagnostics": diagnostics.summarise_spectra({"": diagnostics.spectrum(after)}, max(RANKS))
        | {"step": diagnostics.step(before, after) ** 0.5, "aggregation_error": lost**0.5},
    }


def row(case: str) -> dict[str, Any]:
    found = [cell(__file__, {"case": case, "seed": s}, lambda s=s: run(case, s)) for s in SEEDS]
    times = range(min(len(rows) for rows in found))
    names = {name for rows in found for name in rows[-1] if name.endswith(" named")}
    return {
        "named": {
            name.removesuffix(" named"): [rows[-1].get(name) for rows in found]
            for name in sorted(names)
        },
        "case": case,
        "rounds": [
            {name: interval([rows[t][name] for rows in found]) for name in found[0][0]}
            for t in times
        ],
    }


def main() -> None:
    torch.set_num_threads(1)
    optima = [draw(seed, APART, SIDE, len(RANKS)).optimum() for seed in SEEDS]
    ranks = interval([diagnostics.spectrum(W).effective_rank for W in optima])
    about = {"seeds": SEEDS, "ranks": RANKS, "side": SIDE, "apart": APART, "optimum's rank": ranks}
    write(__file__, about | {"rows": [row(case) for case in CASES]})


if __name__ == "__main__":
    main()
