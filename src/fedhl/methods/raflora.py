"""raFLoRA: every component is averaged over the clients that have it (arXiv 2602.13486)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import LoRA, add_products
from fedhl.method import Reference, Update, checked
from fedhl.methods.full_rank import FullRank, FullRankMethod, move


@dataclass(frozen=True)
class RaFLoRA(FullRankMethod):
    """Sum of products, component h averaged only over clients of rank >= h, redistributed by SVD.

    `W ← Σ_h Σ_{i: r_i >= h} (p_i / P_h) s_i B_i[:, h] A_i[h, :]`, `P_h = Σ_{k: r_k >= h} p_k`;
    broadcast `B = U_r S_r / s_i`, `A = V_rᵀ`. Between two successive ranks of the cohort the set of
    contributors is one, so this is the paper's sum over rank partitions.

    Inferred: the scale of every client is folded in; the sum is that of a public reimplementation of
    Algorithm 1; the split of S; the components above the highest rank of a round. No client was
    sent those, so they stay as the server would have sent them: otherwise a round of small clients would
    cut the rank for good.
    Cost: one SVD and one product of inner size `Σ r_i` per layer; the updates are read twice.
    Client: stores nothing between rounds.
    Nearest neighbour: FlexLoRA, which divides every component by the whole cohort, and so shrinks the
    components that few clients hold, each round anew (rank collapse).
    Limitation: it depends on how each client splits its product into components, since those are
    weighted differently; what W has beyond the top rank is forgotten every round.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"one client"})
    reference: ClassVar[Reference] = Reference.arxiv("2602.13486")

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        held = [(u.lora.rank, u.weight) for u in checked(updates, state.shape)]
        seen = max((r for r, p in held if p > 0), default=0)
        P = torch.tensor(
            [sum(p for r, p in held if r > h) for h in range(seen)],
            dtype=torch.float64,
            device=state.W.device,
        )

        def terms() -> Iterator[tuple[float, LoRA]]:
            for u in updates:
                if u.weight > 0:
                    yield u.weight, LoRA(u.lora.A, u.lora.B / P[: u.lora.rank], u.lora.scale)
            yield 1.0, LoRA(state.sent.A[seen:], state.sent.B[:, seen:], 1.0)

        return move(state, add_products(torch.zeros_like(state.W), terms()))
