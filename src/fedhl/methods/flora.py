"""FLoRA: the updates are stacked and merged, and every round starts anew (arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, add_products, initial
from fedhl.method import Broadcast, Formula, Method, Reference, Traffic, Update, checked
from fedhl.methods.full_rank import FullRank, begin, send
from fedhl.seeds import derive
from fedhl.subspace import energy


def restart(state: FullRank, W: Tensor) -> FullRank:
    """The state one round later: W in the base, and a fresh adapter, the same for all clients."""
    round = state.round + 1
    m, n = state.shape
    fresh = initial(m, n, state.sent.rank, 1.0, derive(state.seed, "restart", round))
    sent = LoRA(fresh.A.to(W), fresh.B.to(W), 1.0)
    return FullRank(W, sent, energy(W), state.seed, round)


@dataclass(frozen=True)
class FLoRA(Method[FullRank]):
    """Stack, merge, restart: the exact mean goes into the base, and every client gets a fresh adapter.

    `W ← W + Σ p_i s_i B_i A_i`, the product of the stacked factors `[p_i s_i B_i]` and `[A_i]`.
    Broadcast: W in the base, `B = 0` and a random A whose first r rows serve rank r.

    Inferred: the scale of every client is folded in; one draw of A for all clients, from the seed and
    the round; the first round takes the given A.
    Cost: one product of inner size `Σ r_i` per layer, no SVD.
    Client: keeps its base, merges into it the stacked adapters of all others, each round
    (`Σ r_i (m + n)` numbers, also those of the rounds it sat out), and draws its own fresh A.
    Nearest neighbour: FedHL, with the same sum, whose clients go on from `T_r(W)` instead of from zero.
    Limitation: every round begins with a random A that knows nothing, and the download grows with
    the cohort.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "gauge", "one client"})
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="Σr (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference.arxiv("2409.05976")

    def init(self, lora: LoRA, seed: int = 0) -> FullRank:
        return begin(lora, seed)

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        return replace(send(state, rank, scale), base=state.W)

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        terms = ((u.weight, u.lora) for u in checked(updates, state.shape))
        return restart(state, add_products(state.W, terms))

    def delta(self, state: FullRank) -> Tensor:
        return state.W

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=sum(cohort) * (m + n), up=rank * (m + n))
