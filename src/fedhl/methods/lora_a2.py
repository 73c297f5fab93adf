"""LoRA-A²: factors in turn, and for each client a choice of the components (ACL 2025 long 19)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, own, prefix
from fedhl.method import (
    Broadcast,
    Formula,
    Method,
    Reference,
    Traffic,
    Update,
    check_broadcast,
    checked,
)
from fedhl.methods.one_adapter import Counted
from fedhl.methods.rolora import trained
from fedhl.seeds import generator


@dataclass(frozen=True)
class LoRAA2(Method[Counted]):
    """Alternating factors; a client trains r_i of the R components, chosen by their importance.

    With S_i the components of client i: `B_j ← B_j + Σ_{i: j in S_i} p_i (s_i B_ij / s - B_j)` in
    rounds 0, 2, ..., `A_j ← A_j + Σ_{i: j in S_i} p_i (A_ij - A_j)` in rounds 1, 3, .... The
    components that a client does not train are merged into its base: every client starts at the full
    global model.

    The components are drawn one after the other, without replacement, with probability proportional
    to `(1 - floor) ||B_j|| ||A_j|| / Σ_k ||B_k|| ||A_k|| + floor / R`; components that could
    not learn, because the factor that is fixed in this round is zero, are drawn only if there are no others.

    Inferred: the choice itself. The paper has factors in turn, B in even rounds, and components by
    budget. Its client ranks components by how much its own
    data changes their part of ΔW, over all layers at once, which only the client can do; here the
    server draws them, layer by layer, by their size.
    Cost: none to speak of.
    Client: downloads all R components (`traffic` takes the largest rank of the cohort for R) and the index
    of its own; stores nothing between rounds. The paper's client keeps them, and downloads one factor.
    Nearest neighbour: RoLoRA, which trains all components of equal ranks (FSLoRA draws components too,
    but uniformly, trains both factors and leaves out of the model what it did not draw).
    Limitation: a component that few clients choose moves by their weight only (a zero stands for the
    rest); the paper found that choosing by size is worse than by its own criterion. Narrow numbers on the
    wire round the fixed factor for the clients alone, so that the mean is not exact.
    """

    floor: float = 0.2

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"exact mean", "no-op", "one client"})
    per_client: ClassVar[bool] = True
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="R_c (m + n)", up="r (m + n) / 2")
    reference: ClassVar[Reference] = Reference(
        "ACL 2025 long 19", "https://arxiv.org/abs/2410.22815"
    )

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {self.floor}")

    def init(self, lora: LoRA, seed: int = 0) -> Counted:
        return Counted(own(lora), 0)

    def broadcast(self, state: Counted, rank: int, scale: float, key: int = 0) -> Broadcast:
        lora = state.lora
        check_broadcast(rank, scale, lora.rank)
        index = self.components(state, rank, key)
        rest = torch.tensor(sorted(set(range(lora.rank)) - set(index.tolist())), dtype=torch.int64)
        sent = prefix(take(lora, index), rank, scale)
        merged = take(lora, rest) if len(rest) else None
        train = frozenset({trained(state.round)})
        return Broadcast(sent, train=train, index=index, merged=merged)

    def components(self, state: Counted, rank: int, key: int) -> Tensor:
        """The components that one client trains, sorted, shape (rank,)."""
        R = state.lora.rank
        norms = {
            "A": state.lora.A.double().norm(dim=1),
            "B": state.lora.B.double().norm(dim=0),
        }
        size = norms["A"] * norms["B"]
        share = size / size.sum() if size.any() else torch.full_like(size, 1 / R)
        chance = (1 - self.floor) * share + self.floor / R
        # Clocks that ring after an exponential time of rate `chance`: the first to ring is j with
        # probability chance_j, and so on among those that are left.
        g = generator(key, "components", state.round)
        clock = -torch.rand(R, generator=g, dtype=torch.float64).log().to(chance) / chance
        fixed = norms["A" if trained(state.round) == "B" else "B"]
        order = sorted(range(R), key=lambda j: (float(fixed[j]) == 0, float(clock[j])))
        return torch.tensor(sorted(order[:rank]))

    def aggregate(self, state: Counted, updates: Iterable[Update]) -> Counted:
        lora, factor = state.lora, trained(state.round)
        step = torch.zeros_like(getattr(lora, factor))
        for update in checked(updates, lora.shape):
            index, sent, back = update.sent.index, update.sent.lora, update.lora
            if index is None or len(index) != back.rank:
                raise ValueError(
                    f"an update of rank {back.rank} answers a broadcast of index {index}, "
                    "expected an index of its rank"
                )
            index = index.to(step.device)
            # What was sent is subtracted as it was sent: then a client that returns it moves nothing.
            if factor == "B":
                moved = back.scale * back.B.to(step) - sent.scale * sent.B.to(step)
                step.index_add_(1, index, moved, alpha=update.weight / lora.scale)
            else:
                moved = back.A.to(step) - sent.A.to(step)
                step.index_add_(0, index, moved, alpha=update.weight)
        following = replace(lora, **{factor: getattr(lora, factor) + step})
        return Counted(following, state.round + 1)

    def delta(self, state: Counted) -> LoRA:
        return state.lora

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=max(cohort) * (m + n), up=rank * (m + n) / 2)


def take(lora: LoRA, index: Tensor) -> LoRA:
    """The components `index` of an adapter."""
    return LoRA(lora.A[index], lora.B[:, index], lora.scale)
