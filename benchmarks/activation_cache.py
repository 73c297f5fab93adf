"""Time rounds and evaluations of a config with and without `compute.cache_activations`.

    python benchmarks/activation_cache.py CONFIG [--rounds 30] [--json FILE] [--set KEY=VALUE ...]

Two federations of the same rows and ranks take turns, round by round, on one thread. Every evaluation of the
one without a cache is done by both, and their losses must agree. Prints the seconds of training in the first
round, in the last one, and in all, those of an evaluation, and what the two models reach.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fedhl.config import load_config
from fedhl.federation.engine import run_round
from fedhl.federation.prepare import prepare
from fedhl.federation.scores import evaluate_global
from fedhl.model.activation_cache import CachedObjective
from fedhl.run.commit import commit

AGREE = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far apart the losses of one model may be, relative to them."""
EVALUATIONS = 3


def measured(config: Path, settings: list[str], rounds: int) -> dict[str, Any]:
    """The figures of one config, without a cache at index 0 and with it at index 1 of every pair."""
    both = [
        prepare(
            load_config(config, [*settings, "compute.threads=1", f"compute.cache_activations={on}"])
        )
        for on in ("false", "true")
    ]
    federations = [prepared.federation for prepared in both]
    plain, cached = federations
    cache = cached.objective
    assert isinstance(cache, CachedObjective)
    states = [prepared.initial_state() for prepared in both]
    train: list[list[float]] = []
    for _ in range(rounds):
        pairs = [run_round(f, state) for f, state in zip(federations, states, strict=True)]
        states = [state for state, _ in pairs]
        train.append([outcome.seconds["train"] for _, outcome in pairs])
    trained = len(cache.activations)
    evaluation: list[list[float]] = []
    apart = 0.0
    for _ in range(EVALUATIONS):
        times, scores = [], []
        for federation in federations:
            began = perf_counter()
            scores.append(evaluate_global(federation, states[0]))
            times.append(perf_counter() - began)
        evaluation.append(times)
        losses = [score["loss"] for score in scores if score]
        apart = abs(losses[1] / losses[0] - 1)
        if apart > AGREE[plain.config.compute.precision]:
            raise SystemExit(f"the losses are {losses[0]} without a cache and {losses[1]} with it")
    reached = [evaluate_global(f, state) for f, state in zip(federations, states, strict=True)]
    return {
        "config": config.name,
        "settings": settings,
        "rounds": rounds,
        "train": train,
        "evaluation": evaluation,
        "rows_read": trained,
        "rows": len(cache.group),
        "bytes": cache.bytes,
        "losses_apart": apart,
        "reached": reached,
    }


def said(found: dict[str, Any]) -> str:
    first, last = found["train"][0], found["train"][len(found["train"]) // 2 :]
    whole = [sum(times) for times in zip(*found["train"], strict=True)]
    late = [median(times) for times in zip(*last, strict=True)]
    again = [median(times) for times in zip(*found["evaluation"][1:], strict=True)]
    pairs = {"first round": first, "later rounds": late, "all": whole, "evaluation": again}
    lines = [f"{found['config']} {' '.join(found['settings'])}: {found['bytes'] / 1e6:.0f} MB"]
    lines += [f"  {name}: {a:.2f} s, {b:.2f} s, {a / b:.2f}" for name, (a, b) in pairs.items()]
    return "\n".join([*lines, f"  reached: {found['reached']}, apart {found['losses_apart']:.1g}"])


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="a file for the figures, which is added to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(given.config, given.set, given.rounds)
    print(said(found))
    if given.json:
        told = json.loads(given.json.read_text()) if given.json.exists() else {"cases": []}
        versions = {"commit": commit(), "torch": str(torch.__version__), "threads": 1}
        cases = [*told["cases"], found]
        given.json.write_text(json.dumps({**versions, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
