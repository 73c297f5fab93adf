"""ECLoRA: FlexLoRA that makes up for what the largest rank could not hold (IEEE TNNLS 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, add_products
from fedhl.method import Reference, Update, checked
from fedhl.methods.full_rank import FullRank, FullRankMethod, move


@dataclass(frozen=True)
class ECLoRA(FullRankMethod):
    """FlexLoRA with error compensation at the top rank.

    `W ← Σ p_i s_i B_i A_i + (W - T_R(W))`, R the top rank: what the last truncation to R left out is
    added to the next mean. Broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`, as in FlexLoRA.

    Inferred: the scale of every client is folded in. The sum is that of the idea; the published code forms it
    and then decomposes the mean without it, which is FlexLoRA.
    Cost: one SVD and one product of inner size `Σ r_i + R` per layer.
    Client: nothing between rounds.
    Nearest neighbour: FedHL, which subtracts from each client what that client was sent, `T_{r_i}(W)`, where
    ECLoRA subtracts `T_R(W)` for all.
    Limitation: exact where all clients have the top rank; what a smaller rank takes from a client's start
    is still subtracted from W in every round.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"gauge", "one client"})
    reference: ClassVar[Reference] = Reference(
        "IEEE TNNLS 2025", "https://doi.org/10.1109/TNNLS.2025.3586545"
    )

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        def terms() -> Iterator[tuple[float, LoRA]]:
            yield -1.0, state.sent  # T_R(W)
            yield from ((u.weight, u.lora) for u in checked(updates, state.shape))

        return move(state, add_products(state.W, terms()))
