"""FRLoRA: each round is merged, and the next starts from W0's principal components (ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, empty, own, trainable_truncation
from fedhl.method import (
    Broadcast,
    Formula,
    Method,
    Reference,
    Traffic,
    Update,
    check_alike,
    checked,
    if_fewer,
)
from fedhl.methods.one_adapter import whole


@dataclass(frozen=True, eq=False)
class Anchored:
    """`lora`: the adapter from which every round starts; `base (m, n)`: what every client adds to its frozen
    weight; `last`: the components that the last round has added to the base, of rank 0 before round 1."""

    lora: LoRA
    base: Tensor
    last: LoRA


@dataclass(frozen=True)
class FRLoRA(Method[Anchored]):
    """Every round starts from the same principal components of W0; what the mean factors moved is merged.

    `s B0 A0 = T_r(W0)` with `B0 = U_r √(S_r / s)`, `A0 = √(S_r / s) V_rᵀ`; `base = -s B0 A0` at first, so
    that the model is W0. Then `base ← base + s (B A - B0 A0)`, `A = Σ p_i A_i`, `B = Σ p_i B_i`; broadcast
    A0, B0 and the base. The state before `from_base` starts from the given adapter in place of (A0, B0).

    Inferred: the abstract and the published code were read, not the paper's text. As in the code, the
    components are those of the pre-trained W0 in every round, not of the merged weight. Ours are weights
    other than the code's uniform ones; a start from a trained adapter, whose update is put into the base;
    and a random row of A for a component that W0 lacks.
    Cost: one SVD per layer before round 1, then one product of inner size 2 r per layer and round.
    Client: keeps its base, merges 2 r components into it each round, and downloads A0 and B0 again; one that
    is new, or sat out a round, is sent the base whole. A client that kept A0 and B0, which never change,
    would need the mean factors alone, `r (m + n)` numbers.
    Nearest neighbour: FedIT, with the same product of means, whose clients go on from the mean factors;
    FLoRA, which merges the mean of products and starts from a random A.
    Limitation: the product of means is not the mean of products; a base narrower than float32 rounds the
    components that are subtracted, so that the model is not quite W0 at first; ranks and scales must be
    equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    weighting: ClassVar[str] = "uniform"
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="min(2 r (m + n), m n) + r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference(
        "ICLR 2025", "https://openreview.net/forum?id=e0rQRMUhs7"
    )

    def init(self, lora: LoRA, seed: int = 0) -> Anchored:
        lora = own(lora)
        base = lora.B.new_zeros(lora.shape)
        return Anchored(lora, base, empty(base))

    def from_base(self, state: Anchored, W0: Tensor, seed: int = 0) -> Anchored:
        """See `fedhl.method.FromBase`."""
        given, s = state.lora, state.lora.scale
        cut = trainable_truncation(W0.to(given.B), given.rank, seed)  # B = U S, A = Vᵀ
        S = torch.linalg.vector_norm(cut.B, dim=0)
        root = torch.where(S > 0, (S / s).sqrt(), 1.0)  # keeps a row of A where B is zero
        lora = LoRA(root[:, None] * cut.A, cut.B / (s * root), s)
        return replace(state, lora=lora, base=self.delta(state) - lora.delta())

    def broadcast(self, state: Anchored, rank: int, scale: float, key: int = 0) -> Broadcast:
        return Broadcast(whole("frlora", state.lora, rank, scale), base=state.base)

    def grown(self, state: Anchored) -> LoRA | None:
        """What the last round has added to the base: see `fedhl.method.Growing`."""
        return if_fewer(state.last)

    def aggregate(self, state: Anchored, updates: Iterable[Update]) -> Anchored:
        A0, B0, s = state.lora.A, state.lora.B, state.lora.scale
        dA, dB = torch.zeros_like(A0), torch.zeros_like(B0)
        for update in checked(updates, state.lora.shape):
            lora, sent = update.lora, update.sent.lora
            check_alike("frlora", lora.rank, lora.scale, state.lora)
            dA += update.weight * (lora.A - sent.A).to(A0)
            dB += update.weight * (lora.B - sent.B).to(B0)
        # B A - B0 A0 is a small difference of large products; in these components nothing cancels
        last = LoRA(torch.cat([A0 + dA, dA]), torch.cat([dB, B0], dim=1), s)
        return replace(state, base=state.base + last.delta(), last=last)

    def delta(self, state: Anchored) -> Tensor:
        return state.base + state.lora.delta()

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        adapter = rank * (m + n)
        return Traffic(down=min(2 * adapter, m * n) + adapter, up=adapter)
