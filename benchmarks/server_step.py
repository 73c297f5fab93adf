"""Time one FedHL layer step (accumulate, truncate, be ready to send) against the literal algorithm.

    python benchmarks/server_step.py [--clients 10 30] [--repeats 5] [--json FILE]

The literal algorithm takes one full SVD of W per client, to send and to subtract. Both are given the same
updates, and must end at the same W; the repeats are interleaved. Shapes are those of MiniLM and SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from fedhl import LoRA, Update, get_method
from fedhl.lora import initial, truncate
from fedhl.summary import commit

SHAPES = [(192, 576), (384, 384), (576, 576), (1536, 576)]
RANKS = (4, 8, 16, 32, 64)


def cohort(state: object, shape: tuple[int, int], clients: int, seed: int) -> list[Update]:
    """Clients of drawn ranks that each moved a little from what they were sent."""
    method, draw = get_method("fedhl"), torch.Generator().manual_seed(seed)
    updates = []
    for _ in range(clients):
        rank = RANKS[int(torch.randint(len(RANKS), (1,), generator=draw))]
        sent = method.broadcast(state, rank, 2.0)
        A = sent.lora.A + 0.01 * torch.randn(rank, shape[1], generator=draw)
        B = sent.lora.B + 0.01 * torch.randn(shape[0], rank, generator=draw)
        updates.append(Update(sent, LoRA(A, B, 2.0), 1 / clients))
    return updates


def literal(W: Tensor, updates: list[Update]) -> Tensor:
    """`W + Σ p_i (s_i B_i A_i - T_{r_i}(W))` as it is written, an SVD for each client."""
    total = W.clone()
    for u in updates:
        total += u.weight * (u.lora.delta() - truncate(W, u.lora.rank).delta())
    return total


def seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "results" / "server_step.json"
    )
    arguments = parser.parse_args()
    method, rows = get_method("fedhl"), []
    print(
        f"{'layer':>12} {'clients':>8} {'fedhl':>10} {'literal':>10} {'ratio':>7} {'difference':>11}"
    )
    for shape in SHAPES:
        state = method.init(initial(*shape, rank=64, scale=2.0, seed=0))
        for round in range(2):  # a state as after two rounds: W of more than the top rank
            state = method.aggregate(state, cohort(state, shape, 10, seed=round))
        W = method.delta(state)
        assert isinstance(W, Tensor)
        for clients in arguments.clients:
            updates = cohort(state, shape, clients, seed=2)
            ours, theirs = [], []
            for _ in range(arguments.repeats):
                ours.append(seconds(partial(method.aggregate, state, updates)))
                theirs.append(seconds(partial(literal, W, updates)))
            after = method.delta(method.aggregate(state, updates))
            assert isinstance(after, Tensor)
            difference = float((after - literal(W, updates)).norm() / after.norm())
            # Rounding of float32 sums over K clients; anything more is another algorithm.
            assert difference < 1e-6 * clients, difference
            row = {
                "m": shape[0],
                "n": shape[1],
                "clients": clients,
                "fedhl seconds": median(ours),
                "literal seconds": median(theirs),
                "ratio": median(theirs) / median(ours),
                "relative difference": difference,
            }
            rows.append(row)
            print(
                f"{shape[0]:>5} x {shape[1]:<4} {clients:>8} {row['fedhl seconds']:>9.4f}s "
                f"{row['literal seconds']:>9.4f}s {row['ratio']:>6.1f}x {difference:>11.1e}"
            )
    machine = {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "commit": commit(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
