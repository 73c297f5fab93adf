"""FLoRA: the updates are stacked and merged, and every round starts anew (arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedhl.method import Reference, Update, checked
from fedhl.methods.restarting import Grown, RestartingMethod


@dataclass(frozen=True)
class FLoRA(RestartingMethod):
    """Stack, merge, restart: the exact mean goes into the base, and every client gets a fresh adapter.

    `W ← W + Σ p_i s_i B_i A_i`, the product of the stacked factors `[p_i s_i B_i]` and `[A_i]`.
    Broadcast: W in the base, `B = 0` and a random A whose first r rows serve rank r.

    Inferred: the scale of every client is folded in; one draw of A for all clients, from the seed and
    the round; the first round takes the given A.
    Cost: one product of inner size `Σ r_i` per layer, no SVD.
    Client: keeps its base, merges into it the stacked adapters of all others, each round
    (`Σ r_i (m + n)` numbers), and draws its own fresh A. One that sat out a round, or if the matrix has
    fewer numbers than the stack, is sent W whole.
    Nearest neighbour: FedHL, with the same sum, whose clients go on from `T_r(W)` instead of from zero.
    Limitation: every round begins with a random A that knows nothing, and the download grows with
    the cohort.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    reference: ClassVar[Reference] = Reference.arxiv("2409.05976")

    def aggregate(self, state: Grown, updates: Iterable[Update]) -> Grown:
        terms = ((u.weight, u.lora) for u in checked(updates, state.full.shape))
        return self.merge(state, terms)
