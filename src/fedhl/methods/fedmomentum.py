"""FedMomentum: the best rank r of the mean product trains on, the rest is merged (arXiv 2603.08014)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, concat, own, refill, truncate
from fedhl.method import (
    Broadcast,
    Formula,
    Method,
    Reference,
    Traffic,
    Update,
    changes,
    check_alike,
    checked,
)
from fedhl.methods.one_adapter import whole
from fedhl.seeds import derive


@dataclass(frozen=True, eq=False)
class Carried:
    """`lora`: the components that train on; `base (m, n)`: what all rounds left out of them, which every
    client adds to its frozen weight; `seed` and `round`: for components that have to be drawn."""

    lora: LoRA
    base: Tensor
    seed: int
    round: int = 0


@dataclass(frozen=True)
class FedMomentum(Method[Carried]):
    """FedIT made exact by an SVD: the adapter of the next round is the best rank r of the mean product.

    `P = Σ p_i s B_i A_i`, `s B A = T_r(P)` with `A = V_rᵀ`, `base ← base + P - T_r(P)`.

    Inferred from a summary: how the singular values are shared between the factors, and the weights. A
    component of P that is zero gets a random row of A, so that it can learn.
    Cost: the SVD of `(2 K + 1) r` components, through their factors, and their product.
    Client: the base (m n numbers per layer, in place in its model), of which it downloads m n numbers.
    Nearest neighbour: FedEx-LoRA, whose next adapter is the product of the mean factors; FlexLoRA, which
    drops the rest of P.
    Limitation: a download of a full matrix; what is in the base is never trained again; ranks and scales
    must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="m n + r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference.arxiv("2603.08014")

    def init(self, lora: LoRA, seed: int = 0) -> Carried:
        lora = own(lora)
        return Carried(lora, lora.B.new_zeros(lora.shape), seed)

    def broadcast(self, state: Carried, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("fedmomentum", state.lora, rank, scale), base=state.base)

    def aggregate(self, state: Carried, updates: Iterable[Update]) -> Carried:
        old = state.lora

        def alike() -> Iterator[Update]:
            for update in checked(updates, old.shape):
                check_alike("fedmomentum", update.lora.rank, update.lora.scale, old)
                yield update

        terms = [(1.0, old), *changes(alike())]
        # in float64: what is left out is a small difference of large sums
        P = concat((w, LoRA(x.A.double(), x.B.double(), x.scale)) for w, x in terms)
        cut = refill(truncate(P, old.rank), old.rank, derive(state.seed, "refill", state.round))
        lora = LoRA(cut.A.to(old.A), (cut.B / old.scale).to(old.B), old.scale)
        sent = LoRA(lora.A.double(), lora.B.double(), lora.scale)  # with its rounding
        base = (state.base + (P.delta() - sent.delta())).to(state.base)
        return replace(state, lora=lora, base=base, round=state.round + 1)

    def delta(self, state: Carried) -> Tensor:
        return state.base + state.lora.delta()

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        adapter = rank * (m + n)
        return Traffic(down=m * n + adapter, up=adapter)
