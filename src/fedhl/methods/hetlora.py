"""HetLoRA: factors of every rank averaged with zeros for what is missing (arXiv 2401.06432)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, prefix
from fedhl.method import Broadcast, Reference, Update, check_broadcast, checked
from fedhl.methods.one_adapter import OneAdapterMethod


@dataclass(frozen=True)
class HetLoRA(OneAdapterMethod):
    """Factors zero-padded to the top rank and averaged; clients may prune their own rank.

    `A = Σ p_i pad(A_i)`, `B = Σ p_i (s_i/s) pad(B_i)`, s the scale of the first adapter; broadcast: the
    first r_i components. While it trains a client adds `decay · s_i ||B_i[:, k:]||_F ||A_i[k:]||_F` per
    layer to its loss, `k = ⌈gamma r_i⌉` but at most `r_i - 1`; if the sum of these products has fallen by
    the end of training, it goes on with rank k. `gamma = 1` is without pruning.

    Inferred: folding the scales into B, the default of `decay`, `k < r_i` (or a
    gamma near 1 would never prune), and that a tail that was zero before training is not judged. A
    component that no client of the round has gets `B = 0`, as printed, but keeps the server's row
    of A, since with both zero it could never learn again.
    Cost: none to speak of.
    Client: nothing between rounds but its own rank.
    Nearest neighbour: RBLA, which averages a component over the clients that have it.
    Limitation: with a share h of the weight behind it a component shrinks by h in both factors, even
    if nobody trains; truncation cuts components that are in no order; cross terms as in FedIT.
    """

    gamma: float = 0.99
    decay: float = 5e-3

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"one client"})
    weighting: ClassVar[str] = "norm"
    starts: ClassVar[str] = "prefix"
    reference: ClassVar[Reference] = Reference.arxiv("2401.06432")

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay must be >= 0 and finite, got {self.decay}")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.rank)
        return Broadcast(prefix(state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        A, B, held = padded_sums(state, updates)
        A = torch.where(held[:, None] > 0, A, state.A)
        return LoRA(A.to(state.A), B.to(state.B), state.scale)

    def penalty(self, lora: LoRA) -> Tensor:
        return self.decay * tail(lora, self.pruned(lora.rank))

    def pruned_rank(self, before: Mapping[str, LoRA], after: Mapping[str, LoRA]) -> int:
        rank = max(lora.rank for lora in after.values())
        k = self.pruned(rank)
        old, new = (sum(float(tail(x, k)) for x in side.values()) for side in (before, after))
        return k if new < old else rank

    def pruned(self, rank: int) -> int:
        """k, the rank after pruning; `rank` itself if there is nothing to prune."""
        if self.gamma == 1 or rank == 1:
            return rank
        k = math.ceil(round(self.gamma * rank, 9))  # 0.55 · 100 is 55.00000000000001
        return min(k, rank - 1)


def tail(lora: LoRA, k: int) -> Tensor:
    """`s ||B[:, k:]||_F ||A[k:]||_F`; where a norm is zero its gradient is zero, too."""
    B, A = (torch.linalg.vector_norm(x) for x in (lora.B[:, k:], lora.A[k:]))
    return lora.scale * B * A


def padded_sums(state: LoRA, updates: Iterable[Update]) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ p_i pad(A_i)`, `Σ p_i (s_i/s) pad(B_i)` and, per component, the weight of the clients that
    have it; in float64. Raises ValueError for a rank above the server's, and as `checked` does."""
    A, B = (torch.zeros_like(x, dtype=torch.float64) for x in (state.A, state.B))
    held = torch.zeros(state.rank, dtype=torch.float64, device=A.device)
    for update in checked(updates, state.shape):
        lora, r = update.lora, update.lora.rank
        check_broadcast(r, lora.scale, state.rank)
        A[:r] += update.weight * lora.A.to(A)
        B[:, :r] += update.weight * (lora.scale / state.scale) * lora.B.to(B)
        held[:r] += update.weight
    return A, B, held
