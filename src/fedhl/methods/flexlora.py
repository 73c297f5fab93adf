"""FlexLoRA: the dense mean of the clients' updates, truncated for each client (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import add_products
from fedhl.method import Reference, Update, checked
from fedhl.methods.full_rank import FullRank, FullRankMethod, move


@dataclass(frozen=True)
class FlexLoRA(FullRankMethod):
    """Sum of products, redistributed by SVD.

    `W ← Σ p_i s_i B_i A_i`, broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`.

    Dead components are refilled as in FedHL.

    Inferred: the scale of every client is folded in.
    Cost: one SVD and one product of inner size `Σ r_i` per layer.
    Client: nothing between rounds.
    Nearest neighbour: FedHL, which adds the clients' changes to the W it kept.
    Limitation: what truncation takes from a client's start is subtracted from W in every round:
    even a cohort that returns what it was sent moves W, by `-Σ p_i (W - T_{r_i}(W))`.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"gauge", "one client"})
    reference: ClassVar[Reference] = Reference.arxiv("2402.11505")

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        terms = ((u.weight, u.lora) for u in checked(updates, state.shape))
        return move(state, add_products(torch.zeros_like(state.W), terms))
