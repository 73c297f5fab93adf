"""FSLoRA: every client trains a random set of the server's components (arXiv 2501.19389)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Reference, Update, check_broadcast, checked
from fedhl.methods.one_adapter import OneAdapterMethod
from fedhl.seeds import generator


@dataclass(frozen=True)
class FSLoRA(OneAdapterMethod):
    """Random sketches: a client of rank r gets r of the server's R components, scaled by R/r.

    Broadcast: `A[S_i]`, `(R/r_i) (s/s_i) B[:, S_i]`, S_i drawn for this client and round, so that the
    update sent is the server's in expectation. `A[S_i] ← A[S_i] + p_i (A_i - A[S_i])` summed over the
    clients, and so for B, scaled back: the mean of the changes, where a client that was not sent a
    component changes it by nothing.

    Inferred: what the published code means to do, with plain averaging as the server's optimiser. The
    client trains the scaled B itself, where theirs trains B under the scale; with
    SGD its step in B is (r/R)² of theirs.
    Cost: none to speak of.
    Client: nothing between rounds.
    Nearest neighbour: HetLoRA, which always sends the first components and counts what a client does
    not have as zero, not as unchanged.
    Limitation: what a client starts from is right only on average, its variance grows with R/r; cross
    terms as in FedIT.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    weighting: ClassVar[str] = "uniform"
    per_client: ClassVar[bool] = True
    starts: ClassVar[str] = "mean"
    reference: ClassVar[Reference] = Reference.arxiv("2501.19389")

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.rank)
        drawn = torch.randperm(state.rank, generator=generator(key, "sketch"))[:rank]
        index = drawn.sort().values
        up = (state.rank / rank) * (state.scale / scale)
        return Broadcast(LoRA(state.A[index], state.B[:, index] * up, scale), index=index)

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        A, B = (x.to(torch.float64, copy=True) for x in (state.A, state.B))
        for update in checked(updates, state.shape):
            lora, sent, index = update.lora, update.sent.lora, update.sent.index
            if index is None or len(index) != lora.rank:
                raise ValueError("an update answers a broadcast that is not a sketch of its rank")
            down = update.weight * lora.rank / (state.rank * state.scale)
            A[index] += update.weight * (lora.A.to(A) - sent.A.to(A))
            B[:, index] += down * (lora.scale * lora.B.to(B) - sent.scale * sent.B.to(B))
        return LoRA(A.to(state.A), B.to(state.B), state.scale)
