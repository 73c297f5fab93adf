"""FFA-LoRA: A is frozen for ever and only B is trained and averaged (arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Formula, Reference, Traffic, Update
from fedhl.methods.one_adapter import OneAdapterMethod, mean_factors, whole


@dataclass(frozen=True)
class FFALoRA(OneAdapterMethod):
    """The mean of B over one A that never changes, so that the mean of products is exact.

    `B ← Σ p_i B_i`, `A` as it was drawn: `Σ p_i s B_i A = s (Σ p_i B_i) A`. The state is (A, B).

    Cost: none to speak of.
    Client: stores nothing between rounds, and downloads the frozen A with every B; the paper's client keeps
    A, and downloads `r m` numbers.
    Nearest neighbour: FedIT, which trains and averages A as well and so has cross terms.
    Limitation: the update stays in the row space of the first A, of dimension r, for ever; ranks and
    scales must be equal; narrow numbers on the wire round A for the clients alone, so that the mean is not
    exact.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "one client"})
    formula: ClassVar[Formula] = Formula(down="r (m + n)", up="r m")
    reference: ClassVar[Reference] = Reference.arxiv("2403.12313")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("ffa_lora", state, rank, scale), train=frozenset({"B"}))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("ffa_lora", state, updates, "B")

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * (m + n), up=rank * m)
