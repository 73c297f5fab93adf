"""FedEx-LoRA: the product of means, with the residual in the base (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, add_products, concat, empty, own, truncate
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
    if_fewer,
)
from fedhl.methods.one_adapter import whole


@dataclass(frozen=True, eq=False)
class Corrected:
    """`lora`: the mean adapter; `base (m, n)`: the residuals of all rounds, which every client adds
    to its frozen weight; `last`: the last of them as components, of rank 0 if it is known as a matrix
    only."""

    lora: LoRA
    base: Tensor
    last: LoRA


@dataclass(frozen=True)
class FedExLoRA(Method[Corrected]):
    """FedIT made exact: the difference to the mean of products goes into the frozen base.

    `A = Σ p_i A_i`, `B = Σ p_i B_i`, `base ← base + R`, `R = Σ p_i s B_i A_i - s B A`. With
    `residual_rank = k` the best rank-k approximation of R is added instead.

    Inferred: weights other than uniform ones, and that the rank is cut in every round, with nothing
    carried over. The laws claimed and the traffic printed are those of the default, the exact
    residual; with any k that cuts, only "no-op" and "one client" remain.
    Cost: one product of inner size `(K + 3) r` per layer; with k the SVD of the residual's factors.
    Client: the base (m n numbers per layer, in place in its model). It downloads the base in every round,
    m n numbers, or with k, if it took part in the round before, R as k (m + n).
    Nearest neighbour: FedIT, which drops R; FLoRA, which is exact by stacking all and starting afresh.
    Limitation: the base drifts, at a download of a full matrix; R is never trained again; ranks and
    scales must be equal.
    """

    residual_rank: int | None = None

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    weighting: ClassVar[str] = "uniform"
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="m n + r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference.arxiv("2410.09432")

    def __post_init__(self) -> None:
        k = self.residual_rank
        if k is not None and not (isinstance(k, int) and k >= 1):
            raise ValueError(f"residual_rank must be None or a whole number >= 1, got {k}")

    def init(self, lora: LoRA, seed: int = 0) -> Corrected:
        lora = own(lora)
        base = lora.B.new_zeros(lora.shape)
        return Corrected(lora, base, empty(base))

    def broadcast(self, state: Corrected, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("fedex_lora", state.lora, rank, scale), base=state.base)

    def grown(self, state: Corrected) -> LoRA | None:
        """The last residual: see `fedhl.method.Growing`."""
        return if_fewer(state.last)

    def aggregate(self, state: Corrected, updates: Iterable[Update]) -> Corrected:
        old = state.lora
        A, B = (torch.zeros_like(x, dtype=torch.float64) for x in (old.A, old.B))

        def averaged() -> Iterator[Update]:
            for update in checked(updates, old.shape):
                lora = LoRA(update.lora.A.double(), update.lora.B.double(), update.lora.scale)
                check_alike("fedex_lora", lora.rank, lora.scale, old)
                A.add_(lora.A, alpha=update.weight)
                B.add_(lora.B, alpha=update.weight)
                yield replace(update, lora=lora)

        def residual() -> Iterator[tuple[float, LoRA]]:
            # The old mean less what was sent of it is what the wire rounded away: in float32 nothing.
            yield 1.0, old
            yield from changes(averaged())
            # The mean as it will be sent, so that its rounding is in the residual, too.
            yield -1.0, LoRA(A.to(old.A).double(), B.to(old.B).double(), old.scale)

        # In float64: R is a small difference of large sums.
        if self.residual_rank is None:
            last = empty(state.base)
            R = add_products(torch.zeros_like(state.base, dtype=torch.float64), residual())
        else:
            last = truncate(concat(residual()), min(self.residual_rank, *old.shape))
            R, last = last.delta(), LoRA(last.A.to(old.A), last.B.to(old.B), last.scale)
        base = (state.base + R).to(state.base)
        return Corrected(LoRA(A.to(old.A), B.to(old.B), old.scale), base, last)

    def delta(self, state: Corrected) -> Tensor:
        return state.base + state.lora.delta()

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        adapter, k = rank * (m + n), self.residual_rank
        return Traffic(down=adapter + (m * n if k is None else k * (m + n)), up=adapter)
