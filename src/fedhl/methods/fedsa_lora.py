"""FedSA-LoRA: A is shared and averaged, B never leaves its client (arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, own
from fedhl.method import Broadcast, Traffic, Update
from fedhl.methods.one_adapter import mean_factors, whole


@dataclass(frozen=True)
class FedSALoRA:
    """A common A and a B of each client's own: personal models, no global one.

    `A ← Σ p_i A_i`; client i runs `W0 + s B_i A`. The state is (A, B0), where B0 is what a client
    that has no B yet starts from.

    Source: arXiv 2410.01463. What a client that joins late starts from is inferred.
    Cost: none to speak of.
    Client: its own B, of every layer, between rounds; losing it means to start from B0 again.
    Nearest neighbour: FedIT, which averages B too.
    Limitation: there is no global model, hence nothing to evaluate, merge or export for anyone who
    has not taken part; ranks and scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset()  # all of them speak of a global change
    weighting: ClassVar[str] = "examples"
    drawn: ClassVar[bool] = False

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        del seed  # nothing is drawn
        return own(lora)

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        del key
        return Broadcast(whole("fedsa_lora", state, rank, scale), keep=frozenset({"B"}))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return mean_factors("fedsa_lora", state, updates, "A")

    def delta(self, state: LoRA) -> None:
        """None: without the clients' B there is no global change; B0 A would be nobody's model."""

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * n, up=rank * n)
