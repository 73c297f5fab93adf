"""FedSVD: FFA-LoRA whose frozen A is made orthonormal again by an SVD (arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, own, svd
from fedhl.method import Broadcast, Formula, Method, Reference, Traffic, Update
from fedhl.methods.one_adapter import Counted, mean_factors, whole


@dataclass(frozen=True)
class FedSVD(Method[Counted]):
    """Rounds of FFA-LoRA, the product rewritten every `period` rounds with orthonormal rows of A.

    `B ← Σ p_i B_i`; then, after rounds period, 2 period, ..., with `s B A = U Σ Vᵀ`: `A ← Vᵀ`,
    `B ← U Σ / s`. The product does not change.

    Inferred: the period is that of the published code; the first A is the initial adapter's, as
    drawn, and not orthonormal before the first SVD.
    Cost: two QR of r columns and an SVD of r x r per layer (the published code decomposes the m x n
    product).
    Client: A between two SVDs; one that sat out the last of them downloads A again, which `traffic`
    does not count.
    Nearest neighbour: FFA-LoRA, whose A stays as it was drawn.
    Limitation: the rows of Vᵀ span the same space as those of A, so that the update stays in the row
    space of the first A for ever [derived here]; what changes is the basis of it, hence the
    conditioning, and what Adam, clipping and noise do. Ranks and scales must be equal. Narrow numbers on
    the wire round A for the clients alone, so that the mean is not exact.
    """

    period: int = 1

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "one client"})
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="r (m + n)", up="r m")
    reference: ClassVar[Reference] = Reference.arxiv("2505.12805")

    def __post_init__(self) -> None:
        if not (isinstance(self.period, int) and self.period >= 1):
            raise ValueError(f"period must be a whole number >= 1, got {self.period}")

    def init(self, lora: LoRA, seed: int = 0) -> Counted:
        """Raises ValueError if the adapter has more components than an SVD of it has."""
        if lora.rank > min(lora.shape):
            raise ValueError(f"the rank must be <= {min(lora.shape)} here, got {lora.rank}")
        return Counted(own(lora), 0)

    def broadcast(self, state: Counted, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("fedsvd", state.lora, rank, scale), train=frozenset({"B"}))

    def aggregate(self, state: Counted, updates: Iterable[Update]) -> Counted:
        lora = mean_factors("fedsvd", state.lora, updates, "B")
        round = state.round + 1
        return Counted(orthonormal(lora) if round % self.period == 0 else lora, round)

    def delta(self, state: Counted) -> LoRA:
        return state.lora

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=rank * m + rank * n / self.period, up=rank * m)


def orthonormal(lora: LoRA) -> LoRA:
    """The same product and scale, with `A Aᵀ = I`, also where the product has less than full rank."""
    U, S, Vt = svd(lora)
    return LoRA(Vt.contiguous(), (U * S / lora.scale).contiguous(), lora.scale)
