"""RBLA: every component averaged over the clients that have it (arXiv 2408.08699)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import LoRA, prefix
from fedhl.method import Broadcast, Reference, Update, check_broadcast
from fedhl.methods.hetlora import padded_sums
from fedhl.methods.one_adapter import OneAdapterMethod


@dataclass(frozen=True)
class RBLA(OneAdapterMethod):
    """Every component is the mean of the clients that have it.

    `A_j = Σ_{i: r_i >= j} p_i A_i[j] / Σ_{i: r_i >= j} p_i`, and so for B with its scale folded in,
    `(s_i/s) B_i[:, j]`; a component that nobody in the round has stays as it is. The same as
    replication padding, which fills up a client of low rank with the mean of the others.

    Inferred: folding the scales into B, what stays, and that replication padding (arXiv 2406.17477, of
    which we had the abstract) agrees for more than two ranks. The rule is checked against a public
    implementation.
    Cost: none to speak of.
    Client: nothing between rounds.
    Nearest neighbour: HetLoRA, whose zeros for what is missing shrink the mean.
    Limitation: the components of high rank are the opinion of few clients, at full size; cross terms as
    in FedIT.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    starts: ClassVar[str] = "prefix"
    reference: ClassVar[Reference] = Reference.arxiv("2408.08699")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.rank)
        return Broadcast(prefix(state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        A, B, held = padded_sums(state, updates)
        A = torch.where(held[:, None] > 0, A / held[:, None], state.A)
        B = torch.where(held > 0, B / held, state.B)
        return LoRA(A.to(state.A), B.to(state.B), state.scale)
