"""LoRA-FAIR: the mean of B corrected so that the product is the mean product (arXiv 2411.14961)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Reference, Update
from fedhl.methods.one_adapter import OneAdapterMethod, mean_factors, whole


@dataclass(frozen=True)
class LoRAFAIR(OneAdapterMethod):
    """Product of means with a correction of B that brings it near the mean of products.

    `Ā = Σ p_i A_i`, `B̄ = Σ p_i B_i`, `ΔB = argmin ||(B̄ + ΔB) Ā - M||_F² + μ ||ΔB||_F²` with
    `M = Σ p_i B_i A_i` and `μ = lam tr(Ā Āᵀ)/r`, hence `ΔB = (M Āᵀ - B̄ Ā Āᵀ)(Ā Āᵀ + μ I)⁻¹`;
    broadcast `B̄ + ΔB`, Ā. M itself is never formed.

    Inferred: we had a summary of the paper. It measures nearness by cosine similarity, adds
    `λ ||ΔB||` with λ = 0.01 and descends by SGD. The squared distance, its closed form and a `lam`
    relative to the mean eigenvalue of `Ā Āᵀ` are ours: nothing depends on the layer's scale.
    Cost: `M Āᵀ`, products of inner size n and r per client, and one r x r inverse; updates read twice.
    Client: nothing between rounds.
    Nearest neighbour: FedIT, which is `lam → ∞`.
    Limitation: what M has outside the row space of Ā is lost; ranks and scales must be equal.
    """

    lam: float = 0.01

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    reference: ClassVar[Reference] = Reference.arxiv("2411.14961")

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam must be >= 0 and finite, got {self.lam}")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("lora_fair", state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        exact = LoRA(state.A.double(), state.B.double(), state.scale)
        mean = mean_factors("lora_fair", exact, updates, "AB")
        A, B, MA = mean.A, mean.B, torch.zeros_like(mean.B)
        for update in updates:
            MA += update.weight * update.lora.B.to(B) @ (update.lora.A.to(A) @ A.T)
        gram = A @ A.T
        ridge = self.lam * gram.diagonal().mean() * torch.eye(state.rank).to(gram)
        # The pseudoinverse serves lam = 0, too, where Ā may lack rank.
        B += (MA - B @ gram) @ torch.linalg.pinv(gram + ridge, hermitian=True)
        return LoRA(A.to(state.A), B.to(state.B), state.scale)
