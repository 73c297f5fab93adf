"""FLoRA-NA: combinations of the clients' factors nearest to the mean product (arXiv 2509.26399)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Reference, Update, check_alike, checked
from fedhl.methods.one_adapter import OneAdapterMethod, whole


@dataclass(frozen=True)
class FLoRANA(OneAdapterMethod):
    """Of all combinations of the clients' factors, those whose product is nearest to the mean product.

    `Â = Σ a_i A_i`, `B̂ = Σ b_i B_i`, with `(a, b) = argmin ||B̂ Â - Σ p_i B_i A_i||_F²`, by alternating
    least squares from `a = b = p`: one K x K problem for b and one for a in each of `sweeps` sweeps, set
    up from the r x r blocks `B_iᵀ B_k` and `A_i A_kᵀ`. A step is the shortest that solves its problem,
    so no sweep increases the residual, and where it is zero nothing moves.

    Inferred: we had the abstract and others' accounts, of server-side coefficients that combine the
    clients' factors. One coefficient per client and factor, the weights p_i, the solver and its
    start are ours.
    Cost: products of inner size m and n between all K r components, then K² r² per sweep; the factors
    of all clients are held at once, and K² r² numbers.
    Client: nothing between rounds.
    Nearest neighbour: FedIT, which is `sweeps = 0`; LoRA-FAIR, which moves B freely but A not at all.
    Limitation: 2K numbers cannot reach the mean product, and the coefficients may be negative; ranks
    and scales must be equal.
    """

    sweeps: int = 10

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    reference: ClassVar[Reference] = Reference.arxiv("2509.26399")

    def __post_init__(self) -> None:
        if not (isinstance(self.sweeps, int) and self.sweeps >= 0):
            raise ValueError(f"sweeps must be a whole number >= 0, got {self.sweeps}")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("flora_na", state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        weights: list[float] = []
        loras: list[LoRA] = []
        for update in checked(updates, state.shape):
            check_alike("flora_na", update.lora.rank, update.lora.scale, state)
            if update.weight > 0:  # the others are not in the span
                weights.append(update.weight)
                loras.append(update.lora)
        if not loras:
            raise ValueError("flora_na needs an update of weight > 0, got none")
        p = torch.tensor(weights, dtype=torch.float64, device=state.A.device)
        A = torch.stack([lora.A for lora in loras]).double()
        B = torch.stack([lora.B for lora in loras]).double()
        a, b = nearest(A, B, p, self.sweeps)
        A, B = torch.einsum("k,krn->rn", a, A), torch.einsum("k,kmr->mr", b, B)
        return LoRA(A.to(state.A), B.to(state.B), state.scale)


def nearest(A: Tensor, B: Tensor, p: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """The coefficients a and b, (K,) each, of `A (K, r, n)` and `B (K, m, r)`."""
    left = torch.einsum("imr,kms->ikrs", B, B)  # B_iᵀ B_k
    right = torch.einsum("irn,ksn->ikrs", A, A)  # A_i A_kᵀ
    a, b = p, p
    for _ in range(sweeps):
        b = solved(left, right, b, a, p)
        a = solved(right, left, a, b, p)
    return a, b


def solved(mine: Tensor, other: Tensor, x: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """The minimiser over x of `||(Σ x_i X_i)(Σ y_j Y_j) - Σ p_k X_k Y_k||_F²` nearest to the x given.

    `mine` holds `X_iᵀ X_k`, `other` `Y_j Y_kᵀ`; with Ŷ = Σ y_j Y_j the Gram matrix is
    `<X_i Ŷ, X_k Ŷ> = <X_iᵀ X_k, Ŷ Ŷᵀ>`, the right-hand side `Σ_k p_k <X_iᵀ X_k, Ŷ Y_kᵀ>`.
    """
    across = torch.einsum("j,jkrs->krs", y, other)  # Ŷ Y_kᵀ
    gram = torch.einsum("ikrs,rs->ik", mine, torch.einsum("k,krs->rs", y, across))
    target = torch.einsum("k,ikrs,krs->i", p, mine, across)
    # Normal equations square the condition: below √eps their directions are rounding.
    cutoff = torch.finfo(gram.dtype).eps ** 0.5
    return x + torch.linalg.pinv(gram, rtol=cutoff, hermitian=True) @ (target - gram @ x)
