"""FedIT: the factors are averaged one by one, the product of means (arXiv 2305.05644)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Reference, Update
from fedhl.methods.one_adapter import OneAdapterMethod, mean_factors, whole


@dataclass(frozen=True)
class FedIT(OneAdapterMethod):
    """FedAvg on the factors: `A = Σ p_i A_i`, `B = Σ p_i B_i`, sent to every client. The state is (A, B).

    Cost: none to speak of.
    Client: nothing between rounds.
    Nearest neighbour: FlexLoRA at equal ranks, which averages the products.
    Limitation: `(Σ p_i B_i)(Σ p_i A_i)` has cross terms `B_i A_j` and depends on how each client
    happens to split its product into factors; ranks and scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    reference: ClassVar[Reference] = Reference.arxiv("2305.05644")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("fedit", state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("fedit", state, updates, "AB")
