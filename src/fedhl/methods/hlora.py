"""HLoRA: one bank of the top rank, of which every client takes its prefix (arXiv 2503.00813)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, concat, own, prefix, trainable_truncation
from fedhl.method import (
    Broadcast,
    Method,
    Reference,
    Update,
    check_broadcast,
    checked,
)
from fedhl.methods.full_rank import check_top
from fedhl.seeds import derive


@dataclass(frozen=True, eq=False)
class Bank:
    """`lora`: the global change, scale 1; `seed` and `round` name the draw of components without
    energy."""

    lora: LoRA
    seed: int
    round: int


def bank(mean: LoRA, rank: int, seed: int, round: int) -> Bank:
    """`T_rank(mean)`, of which every component can learn, found through the factors."""
    return Bank(trainable_truncation(mean, rank, derive(seed, "refill", round)), seed, round)


@dataclass(frozen=True)
class HLoRA(Method[Bank]):
    """Sum of products, cut to the top rank R at the server: one bank that all clients slice.

    `W ← T_R(Σ p_i s_i B_i A_i)`, found by QR of the stacked `√p_i`-scaled factors and the SVD of a
    small matrix; broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`.

    Inferred: the paper's server forms the dense mean; the bank and its factored SVD are NVFlare's
    implementation of it, here with the scale of every client folded in. `√p_i` on both factors and
    `p_i` on one are the same product.
    Cost: two QR of the stacked factors and an SVD of inner size `Σ r_i` per layer, never m x n; the
    factors of the whole cohort are in memory at once.
    Client: downloads its own slice of the bank (NVFlare's clients download all of it); stores nothing
    between rounds.
    Nearest neighbour: FlexLoRA, whose global model is the dense mean, which it cuts only for clients.
    Limitation: all beyond rank R is lost every round, at the server too; and, as in FlexLoRA, a client
    of a low rank pulls the components that it was not sent towards zero.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"gauge", "one client"})
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "truncation"
    reference: ClassVar[Reference] = Reference.arxiv("2503.00813")

    def init(self, lora: LoRA, seed: int = 0) -> Bank:
        check_top(lora)
        lora = own(lora)
        if not lora.B.any():  # its SVD would be zero: the given A serves
            return Bank(LoRA(lora.A, lora.B, 1.0), seed, 0)
        return bank(lora, lora.rank, seed, 0)

    def broadcast(self, state: Bank, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.lora.rank)
        return Broadcast(prefix(state.lora, rank, scale))

    def aggregate(self, state: Bank, updates: Iterable[Update]) -> Bank:
        mean = concat((u.weight, u.lora) for u in checked(updates, state.lora.shape))
        A = state.lora.A
        mean = LoRA(mean.A.to(A), mean.B.to(A), 1.0)
        return bank(mean, state.lora.rank, state.seed, state.round + 1)

    def delta(self, state: Bank) -> LoRA:
        return state.lora
