"""FFA-LoRA: A is frozen for ever and only B is trained and averaged (arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, own
from fedhl.method import Broadcast, Traffic, Update
from fedhl.methods.one_adapter import mean_factors, whole


@dataclass(frozen=True)
class FFALoRA:
    """The mean of B over one A that never changes, so that the mean of products is exact.

    `B ← Σ p_i B_i`, `A` as it was drawn: `Σ p_i s B_i A = s (Σ p_i B_i) A`. The state is (A, B).

    Source: arXiv 2403.12313. The means of both factors that it replaces are FedIT's.
    Cost: none to speak of.
    Client: the frozen A, which it has from the seed or downloads once; `traffic` does not count it.
    Nearest neighbour: FedIT, which trains and averages A as well and so has cross terms.
    Limitation: the update stays in the row space of the first A, of dimension r, for ever; ranks and
    scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "one client"})
    weighting: ClassVar[str] = "examples"
    drawn: ClassVar[bool] = False

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        del seed  # nothing is drawn
        return own(lora)

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        return Broadcast(whole("ffa_lora", state, rank, scale), train=frozenset({"B"}))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("ffa_lora", state, updates, "B")

    def delta(self, state: LoRA) -> LoRA:
        return state

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * m, up=rank * m)
