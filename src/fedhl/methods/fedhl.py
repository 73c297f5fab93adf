"""FedHL: the server keeps the full-rank update and truncation never biases it (arXiv 2505.18494)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA
from fedhl.method import Reference, Update
from fedhl.methods.full_rank import FullRank, FullRankMethod, move, start, unbiased


@dataclass(frozen=True)
class FedHL(FullRankMethod):
    """Unbiased aggregation of adapters of any ranks.

    `W ← W + Σ p_i (s_i B_i A_i - T_{r_i}(W))`, broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`.
    Subtracted is what was sent, after the rounding of its payload (see `fedhl.server.payload`), once for all
    clients of one rank and scale: a thin product, however many clients.

    Before W has rank, the initial adapter's A serves (`A_r` = its first r rows, `B = 0`); later,
    components with σ_j = 0 get seeded random rows of A, so that no rank is ever dead.

    `exact` takes a full SVD each round; otherwise larger layers go by `fedhl.subspace.leading`.

    Inferred: the split `U S, Vᵀ`, the first round, and scales that differ.
    Cost: one SVD per layer, and one product of inner size `Σ r_i` plus each distinct rank once.
    Client: nothing between rounds.
    Nearest neighbour: FlexLoRA, which forgets `W - T_{r_i}(W)` every round.
    Limitation: components of W beyond the top rank are never sent, so never corrected.
    """

    exact: bool = False

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    weighting: ClassVar[str] = "truncation"
    reference: ClassVar[Reference] = Reference.arxiv("2505.18494")

    def init(self, lora: LoRA, seed: int = 0) -> FullRank:
        return start(lora, seed, self.exact)

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        return move(state, unbiased(state, updates), self.exact)
