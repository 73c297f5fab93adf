"""RBLA: every component averaged over the clients that have it (arXiv 2408.08699)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import LoRA, own, prefix
from fedhl.method import Broadcast, Traffic, Update, check_broadcast
from fedhl.methods.hetlora import padded_sums


@dataclass(frozen=True)
class RBLA:
    """Every component is the mean of the clients that have it.

    `A_j = Σ_{i: r_i >= j} p_i A_i[j] / Σ_{i: r_i >= j} p_i`, and so for B with its scale folded in,
    `(s_i/s) B_i[:, j]`; a component that nobody in the round has stays as it is. The same as
    replication padding, which fills up a client of low rank with the mean of the others.

    Source: arXiv 2408.08699, the rule checked against a public implementation; replication padding:
    arXiv 2406.17477, of which we had the abstract. Inferred: that the two agree for more than two
    ranks, folding the scales into B, and what stays.
    Cost: none to speak of.
    Client: nothing between rounds.
    Nearest neighbour: HetLoRA, whose zeros for what is missing shrink the mean.
    Limitation: the components of high rank are the opinion of few clients, at full size; cross terms as
    in FedIT.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    weighting: ClassVar[str] = "examples"
    drawn: ClassVar[bool] = False

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        del seed  # nothing is drawn
        return own(lora)

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        check_broadcast(rank, scale, state.rank)
        return Broadcast(prefix(state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        A, B, held = padded_sums(state, updates)
        A = torch.where(held[:, None] > 0, A / held[:, None], state.A)
        B = torch.where(held > 0, B / held, state.B)
        return LoRA(A.to(state.A), B.to(state.B), state.scale)

    def delta(self, state: LoRA) -> LoRA:
        return state

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * (m + n), up=rank * (m + n))
