"""FedSA-LoRA: A is shared and averaged, B never leaves its client (arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Formula, Reference, Traffic, Update
from fedhl.methods.one_adapter import OneAdapterMethod, mean_factors, whole


@dataclass(frozen=True)
class FedSALoRA(OneAdapterMethod):
    """A common A and a B of each client's own: personal models, no global one.

    `A ← Σ p_i A_i`; client i runs `W0 + s B_i A`. The state is (A, B0), where B0 is what a client
    that has no B yet starts from.

    Inferred: what a client that joins late starts from.
    Cost: none to speak of.
    Client: its own B, of every layer, between rounds; losing it means to start from B0 again.
    Nearest neighbour: FedIT, which averages B too.
    Limitation: there is no global model, hence nothing to evaluate, merge or export for a client that
    has not taken part; ranks and scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset()  # all of them speak of a global change
    starts: ClassVar[str] = "other"
    formula: ClassVar[Formula] = Formula(down="r n", up="r n")
    reference: ClassVar[Reference] = Reference.arxiv("2410.01463")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("fedsa_lora", state, rank, scale), keep=frozenset({"B"}))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("fedsa_lora", state, updates, "A")

    def delta(self, state: LoRA) -> None:
        """None: without the clients' B there is no global change; B0 A would be nobody's model."""

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * n, up=rank * n)
