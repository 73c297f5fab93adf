"""FedHera: the client is sent more rank than it trains, the rest as a frozen tail (ICML 2026)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, pad
from fedhl.method import Broadcast, Formula, Method, Reference, Traffic, Update, check_broadcast
from fedhl.methods.full_rank import Tailed, lost, move, send, start, unbiased


@dataclass(frozen=True)
class FedHera(Method[Tailed]):
    """FedHL whose clients start nearer to W: each downloads more components than it trains.

    `W ← W + Σ p_i (s_i B_i A_i - T_{r_i}(W))`, broadcast `B = U_r S_r / s_i`, `A = V_rᵀ` to train and
    `T_t(W) - T_r(W)` in the base, `t = min(download · r, m, n)`.

    Inferred: read in its code, of which this is the `unbiased` server rule; that code's default is a
    plain mean that includes the tails. One factor `download` between the ranks is ours. Left out: the
    allocation of ranks to layers by water-filling, which is rank assignment and no aggregation, the
    tail's warm-up gate, and the balanced split of S.
    Cost: one SVD per layer, and one product of inner size `Σ r_i` plus each distinct rank once, as FedHL.
    Client: downloads `min(download · r, m, n)` components and holds the tail in its base for the round;
    stores nothing between rounds.
    Nearest neighbour: FedHL, which is download 1.
    Limitation: components of W beyond the top rank are still never trained by any client, and components
    beyond `download` times the rank are missing from a client's start.
    """

    download: int = 2

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "other"
    formula: ClassVar[Formula] = Formula(down="2 r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference(
        "ICML 2026", "https://github.com/shock-xiaoke/FedHera"
    )

    def __post_init__(self) -> None:
        if not (isinstance(self.download, int) and self.download >= 1):
            raise ValueError(f"fedhera: download must be an integer >= 1, got {self.download}")

    def init(self, lora: LoRA, seed: int = 0) -> Tailed:
        widest = max(lora.rank, min(self.download * lora.rank, *lora.shape))
        return Tailed(start(pad(lora, widest), seed), lora.rank)

    def broadcast(self, state: Tailed, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.top)
        sent, t = state.full.sent, self.download * rank
        tail = LoRA(sent.A[rank:t], sent.B[:, rank:t], 1.0)
        return replace(send(state.full, rank, scale), merged=tail if tail.rank else None)

    def aggregate(self, state: Tailed, updates: Iterable[Update]) -> Tailed:
        return Tailed(move(state.full, unbiased(state.full, updates)), state.top)

    def delta(self, state: Tailed) -> Tensor:
        return state.full.W

    def lost(self, state: Tailed, rank: int) -> float:
        return lost(state.full, self.download * rank)

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=min(self.download * rank, m, n) * (m + n), up=rank * (m + n))
