"""RoLoRA: B and A are trained and averaged in turn (arXiv 2502.01755)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedhl.lora import LoRA, own
from fedhl.method import Broadcast, Formula, Method, Reference, Traffic, Update
from fedhl.methods.one_adapter import Counted, mean_factors, whole


def trained(round: int) -> Literal["A", "B"]:
    """The factor that is trained in this round (of 0, 1, ...): first B, which starts at zero."""
    return "B" if round % 2 == 0 else "A"


@dataclass(frozen=True)
class RoLoRA(Method[Counted]):
    """Alternating means: one round trains B with A fixed, the next one A with B fixed.

    `B ← Σ p_i B_i` in rounds 0, 2, ..., `A ← Σ p_i A_i` in rounds 1, 3, ...: linear in what is
    averaged, hence exact in every round.

    Inferred: that B comes first. Where it starts at zero, A could not learn before it.
    Cost: none to speak of.
    Client: stores nothing between rounds, and downloads both factors; the paper's client keeps the factor
    that did not change, and downloads `r (m + n) / 2` numbers on average.
    Nearest neighbour: FFA-LoRA, which never trains A.
    Limitation: a factor is trained in every other round only; ranks and scales must be equal; narrow numbers
    on the wire round the fixed factor for the clients alone, so that the mean is not exact.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "one client"})
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="r (m + n)", up="r (m + n) / 2")
    reference: ClassVar[Reference] = Reference.arxiv("2502.01755")

    def init(self, lora: LoRA, seed: int = 0) -> Counted:
        return Counted(own(lora), 0)

    def broadcast(self, state: Counted, rank: int, scale: float, key: int = 0) -> Broadcast:
        lora = whole("rolora", state.lora, rank, scale)
        return Broadcast(lora, train=frozenset({trained(state.round)}))

    def aggregate(self, state: Counted, updates: Iterable[Update]) -> Counted:
        lora = mean_factors("rolora", state.lora, updates, trained(state.round))
        return Counted(lora, state.round + 1)

    def delta(self, state: Counted) -> LoRA:
        return state.lora

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * (m + n), up=rank * (m + n) / 2)
