"""FedIT: the factors are averaged one by one, the product of means (arXiv 2305.05644)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, own
from fedhl.method import Broadcast, Traffic, Update
from fedhl.methods.one_adapter import mean_factors, whole


@dataclass(frozen=True)
class FedIT:
    """FedAvg on the factors: `A = Σ p_i A_i`, `B = Σ p_i B_i`, sent to every client. The state is (A, B).

    Source: arXiv 2305.05644.
    Cost: none to speak of.
    Client: nothing between rounds.
    Nearest neighbour: FlexLoRA at equal ranks, which averages the products.
    Limitation: `(Σ p_i B_i)(Σ p_i A_i)` has cross terms `B_i A_j` and depends on how each client
    happens to split its product into factors; ranks and scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    weighting: ClassVar[str] = "examples"
    drawn: ClassVar[bool] = False

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        del seed  # nothing is drawn
        return own(lora)

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        return Broadcast(whole("fedit", state, rank, scale))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("fedit", state, updates, "AB")

    def delta(self, state: LoRA) -> LoRA:
        return state

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * (m + n), up=rank * (m + n))
