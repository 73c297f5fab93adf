"""FlexLoRA: the dense mean of the clients' updates, truncated for each client (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, add_products
from fedhl.method import Broadcast, Traffic, Update, checked
from fedhl.methods.full_rank import FullRank, lost, move, send, start


@dataclass(frozen=True)
class FlexLoRA:
    """Sum of products, redistributed by SVD.

    `W ← Σ p_i s_i B_i A_i`, broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`.

    Dead components are refilled as in FedHL.

    Source: arXiv 2402.11505, with the scale of every client folded in.
    Cost: one SVD and one product of inner size `Σ r_i` per layer.
    Client: nothing between rounds.
    Nearest neighbour: FedHL, which adds the clients' changes to the W it kept.
    Limitation: what truncation takes from a client's start is subtracted from W in every round:
    even a cohort that returns what it was sent moves W, by `-Σ p_i (W - T_{r_i}(W))`.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"gauge", "one client"})
    weighting: ClassVar[str] = "examples"
    drawn: ClassVar[bool] = False

    def init(self, lora: LoRA, seed: int = 0) -> FullRank:
        return start(lora, seed)

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key  # nothing is drawn
        return send(state, rank, scale)

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        terms = ((u.weight, u.lora) for u in checked(updates, state.shape))
        return move(state, add_products(torch.zeros_like(state.W), terms))

    def delta(self, state: FullRank) -> Tensor:
        return state.W

    def lost(self, state: FullRank, rank: int) -> float:
        return lost(state, rank)

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * (m + n), up=rank * (m + n))
