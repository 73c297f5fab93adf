"""The server step of `fedhl_ef`, whose clients remember, against the product and one truncation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fedhl.bench import problems
from fedhl.bench.checks import difference
from fedhl.bench.problems import (
    RANKS,
    SPECTRA,
    TOP,
    bare,
    draw_ranks,
    moved,
    orthogonal,
    state_of,
    to,
    with_spectrum,
)
from fedhl.bench.timing import Row, Say, describe, interleaved
from fedhl.method import Broadcast, Update
from fedhl.methods.fedhl_ef import FedHLEF
from fedhl.methods.full_rank import Tailed
from fedhl.server.ledger import after
from fedhl.subspace import FLOOR, TOLERANCE, leading

EF = FedHLEF()
ROUNDS = 3
"""Rounds that are run before a step is timed, so that the clients hold something."""
Sent = Mapping[int, Broadcast]
Held = Mapping[int, Tensor]
"""The broadcast to the clients of each rank, and M, what these clients hold."""


def catch_up(state: Tailed, held: Held) -> Sent:
    return {rank: EF.catch_up(state, M, rank, 2.0) for rank, M in held.items()}


def hold(held: Held, sent: Sent) -> Held:
    return {rank: after(M, sent[rank]) for rank, M in held.items()}


def step(state: Tailed, held: Held, updates: Sequence[Update]) -> tuple[Tailed, Sent, Held]:
    """The server's work for one layer in a round: sum, truncate for newcomers and for each distinct memory,
    and bring the memories up to date."""
    following = EF.aggregate(state, updates)
    sent = catch_up(following, held)
    return following, sent, hold(held, sent)


def replies(state: Tailed, sent: Sent, ranks: Sequence[int], round: int) -> list[Update]:
    """The updates of a round: each client moves half as far as in the round before."""
    size = 0.2 * float(state.full.sent.B.norm()) / 2**round
    return moved(sent, ranks, size, round)


def some_rounds(W: Tensor, device: str) -> tuple[Tailed, Sent, Held]:
    """W, the broadcasts and the memories after `ROUNDS` rounds of ten clients, who held nothing at first."""
    state = Tailed(to(state_of(W), device), TOP)
    sent: Sent = {rank: EF.broadcast(state, rank, 2.0) for rank in RANKS}
    held: Held = {rank: after(None, sent[rank]) for rank in RANKS}
    for round in range(ROUNDS):
        state, sent, held = step(state, held, replies(state, sent, draw_ranks(10), round))
    return state, sent, held


def excess(state: Tailed, held: Held, sent: Sent) -> float:
    """The largest relative excess of `‖W - M - D‖²` over the optimum, in float64. Raises AssertionError if it
    is larger than the tolerance."""
    worst = 0.0
    for rank, M in held.items():
        lacks, D = state.full.W - M, sent[rank].lora
        squares = torch.linalg.svdvals(lacks.double()).square()
        best, whole = float(squares[rank:].sum()), float(squares.sum())
        left = float((lacks.double() - D.scale * D.B.double() @ D.A.double()).square().sum())
        worst = max(worst, (left - best) / max(best, FLOOR / TOLERANCE * whole))
    assert worst <= TOLERANCE, worst
    return worst


def next_round(W: Tensor, device: str) -> tuple[Tailed, Held, Sent]:
    """One round after `some_rounds`: the state, what the clients held, and what they are sent."""
    state, sent, held = some_rounds(W, device)
    following, sent, _ = step(state, held, replies(state, sent, draw_ranks(10), ROUNDS))
    return following, held, sent


def layers(side: int) -> dict[str, Tensor]:
    """W of each spectrum."""
    bases, j = (orthogonal(side, 1), orthogonal(side, 2)), torch.arange(1, side + 1)
    return {name: with_spectrum(spectrum(j), bases) for name, spectrum in SPECTRA.items()}


def remembering(repeats: int, say: Say, device: str) -> Iterator[Row]:
    """A step with one memory for each rank, for two numbers of clients, and for two at one total rank; the
    tails are checked on layers of half the side."""
    tails = {name: excess(*next_round(W, device)) for name, W in layers(problems.SIDE // 2).items()}
    for name, W in layers(problems.SIDE).items():
        state, sent, held = some_rounds(W, device)
        cohorts = {f"{K} clients": draw_ranks(K) for K in (10, 100)}
        if name == "1/j":  # one total rank
            cohorts |= {f"{K} of rank {r}": [r] * K for K, r in ((50, 64), (800, 4))}
        for series, ranks in cohorts.items():
            updates = replies(state, sent, ranks, ROUNDS)
            following, increments, _ = step(state, held, updates)
            off = difference(following.full.W, state.full, updates)
            start = state.full.sent.A
            taken = interleaved(
                {
                    "bare product": bare(state.full, sum(ranks)),
                    "truncation": partial(leading, following.full.W, TOP, start),
                    "step": partial(step, state, held, updates),
                    "aggregate": partial(EF.aggregate, state, updates),
                    "after": partial(hold, held, increments),
                },
                repeats,
                device,
            )
            row: Row = {
                **{"series": series, "spectrum": name, "side": problems.SIDE},
                **{"clients": len(ranks), "total rank": sum(ranks), "memories": len(held)},
                **{f"{work}, s": value for work, value in taken.items()},
                "step / bare product": taken["step"] / taken["bare product"],
                "step / truncation": taken["step"] / taken["truncation"],
                "relative difference from float64": off,
                "side of the checked tails": problems.SIDE // 2,
                "largest relative excess of a tail": tails[name],
            }
            say(describe(row))
            yield row
